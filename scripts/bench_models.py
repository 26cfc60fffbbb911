"""The pair of models of the benchmarks: a student of 42M and a teacher of 335M parameters, V = 32,000.

    python scripts/bench_models.py FOLDER    # FOLDER/student and FOLDER/teacher, 0.8 GB; the benchmarks make them

The weights are random, scaled so that logits have a standard deviation of 3, as language models' have. Two random
models disagree at every prefix, so a trust region of epsilon = 0.02 always binds: its total variation, and so the
acceptance of drafts, is what epsilon alone allows. Stored in bfloat16; computed in `native_dtype`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 32_000
EOS, PAD, MARKER = 0, 1, 2
LOGIT_SPREAD = 3.0
SHAPES = {
    "student": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "teacher": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}


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


def make_models(folder: Path) -> Models:
    """Both models with their tokenizer under `folder`, unless they are there."""
    made = Models(folder / "student", folder / "teacher")
    disable_progress_bar()
    for seed, (name, shape) in enumerate(SHAPES.items()):
        target = folder / name
        if target.exists():
            continue
        draft = folder / f"{name}.part"
        shutil.rmtree(draft, ignore_errors=True)
        make_model(shape, seed).save_pretrained(draft)
        make_tokenizer().save_pretrained(draft)
        draft.rename(target)  # a folder that is there is complete
    return made


if __name__ == "__main__":
    print(*make_models(Path(sys.argv[1])))

"""The exported student: a Hugging Face folder with every weight once, whatever the state it is made of shares."""

from pathlib import Path

import pytest
import torch
from engine import save_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from verl_trb.training.export import save_student


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_written_once(tied: bool, tmp_path: Path) -> None:
    """A checkpoint's shards, put together, are copies: nothing in memory says that the output layer is tied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_student(tmp_path / "student", state, config, torch.float32, save_tokenizer(tmp_path), None)
    written = load_file(tmp_path / "student" / "model.safetensors")
    assert written.keys() == (state.keys() - {"lm_head.weight"} if tied else state.keys())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

"""Low-rank adapters: merged as peft merges them; refused where they cannot be; a whole run in the slow suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ToyRun
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from verl_trb import composition
from verl_trb.errors import UserError
from verl_trb.report import read_metrics
from verl_trb.setting_checks import check_verl_settings
from verl_trb.training.lora import merged

LORA = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true"]


def adapted(tied: bool, targets: str | list[str] = "all-linear") -> tuple[torch.nn.Module, float]:
    """A small model with random adapters of rank 3 and alpha 8, and alpha / r."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return wrapped, 8 / 3


@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_what_peft_merges(tied: bool) -> None:
    model, scale = adapted(tied)
    ids = torch.arange(12).reshape(2, 6)
    logits = model(ids).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(merged(model.state_dict(), scale))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # nothing is changed
    plain = model.merge_and_unload()
    assert list(found) == list(plain.state_dict())
    torch.testing.assert_close(found, dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_merged_is_rounded_once() -> None:
    """In bfloat16: the exact sum, rounded, but for float32's own rounding on the way, seen in no entry here."""
    model, scale = adapted(False)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    up, down = (state[f"{stem}.lora_{side}.default.weight"].double() for side in "BA")
    exact = (state[f"{stem}.base_layer.weight"].double() + scale * up @ down).bfloat16()
    found = dict(merged(state, scale))["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact)


def test_a_model_without_adapters_passes_through() -> None:
    state = {"model.norm.weight": torch.ones(3), "lm_head.weight": torch.eye(3)}
    assert dict(merged(state, 0.0)) == state


def test_other_adapters_are_refused() -> None:
    model, scale = adapted(False, ["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="lora_embedding_A.default is no adapter of a linear layer"):
        list(merged(model.state_dict(), scale))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (LORA[:1], "lora_rank=4 needs actor_rollout_ref.model.lora.merge=true"),
        ([*LORA, "actor_rollout_ref.model.target_modules=[q_proj,lm_head]"], "target_modules has lm_head"),
        ([*LORA, "actor_rollout_ref.actor.strategy=fsdp"], "needs actor_rollout_ref.actor.strategy=fsdp2"),
        ([*LORA, "method=exopd"], "has not been tried here and is refused"),
        (["actor_rollout_ref.model.lora.rank=4"], "are asked for by actor_rollout_ref.model.lora_rank=RANK"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], sentence: str, toy: ToyRun) -> None:
    def check(config: DictConfig) -> int:
        check_verl_settings(config)
        return 0

    with pytest.raises(UserError) as refused:
        composition.run(check, [*toy.overrides, *overrides])
    assert sentence in str(refused.value)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_with_adapters(tmp_path: Path) -> None:
    """Engine and trainer agree on the student at every step; only the adapters' layers change; the export is the
    checkpoint, merged; a resumed run goes on.
    """
    from verl_trb.evaluation.models import convert

    run = tmp_path / "run"
    cache = os.environ.get("VERL_TRB_TEST_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "verl_trb.main", "recipe=quickstart_lora", f"trb.cache_dir={cache}"]
    command += [f"trb.run_dir={run}", "trb.warmup_steps=3", "trainer.test_freq=6", "data.val_max_samples=64"]
    for steps in (3, 6):
        subprocess.run([*command, f"trainer.total_training_steps={steps}", "trainer.save_freq=3"], check=True)
    rows = [row for row in read_metrics(run) if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # log mu - log pi_S by the trainer: KL within the trust region, then 0 but for rounding.
    assert all(abs(row["trb/log_ratio_trainer"]) < 1e-3 for row in rows[3:])
    assert all(abs(row["trb/log_ratio_trainer"]) < 0.15 for row in rows[:3])
    student = load_file(run / "student" / "model.safetensors")
    import yaml

    source = Path(yaml.safe_load((run / "config.yaml").read_text())["actor_rollout_ref"]["model"]["path"])
    start = load_file(source / "model.safetensors")
    assert student.keys() == start.keys()
    changed = {name for name in start if not torch.equal(student[name], start[name])}
    assert changed == {name for name in start if "_proj" in name}
    convert(run / "checkpoints" / "global_step_6" / "actor", tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == "float32"
    torch.testing.assert_close(load_file(tmp_path / "converted" / "model.safetensors"), student, rtol=0, atol=0)

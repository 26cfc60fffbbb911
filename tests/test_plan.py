"""The planner: numbers against sums written out by hand, and what it says of the paper's pairs."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl_trb.plan import main
from verl_trb.planning.devices import GIB, GPUS, Cluster, Device, parse_cluster
from verl_trb.planning.job import Workload
from verl_trb.planning.memory import (
    Job,
    activations,
    engine,
    kv_budget,
    most_micro_tokens,
    most_sequences,
    peak,
    phases,
    resident,
)
from verl_trb.planning.remedies import faults, remedies
from verl_trb.planning.roofline import (
    guided_rate,
    pass_seconds,
    student_rate,
    tokens_per_block,
    training_flops,
    tv_bound,
)
from verl_trb.planning.shapes import KNOWN, Shape, from_config
from verl_trb.planning.times import run_seconds, step_time

STUDENT, TEACHER = KNOWN["Qwen/Qwen3-1.7B"], KNOWN["Qwen/Qwen3-8B"]
H100 = GPUS["H100-80GB"]
JOB = Job(student=STUDENT, teacher=TEACHER, memory=H100.memory, shards=8, prompt=1024, response=7168, utilization=0.6)


# Shapes


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_model(tied: bool) -> None:
    import torch

    config = Qwen3Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=300, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    shape = from_config(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.kv_elements == 2 * 3 * 2 * 16


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191), ("14B", 14.768), ("32B", 32.762)],
)
def test_known_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    assert KNOWN[f"Qwen/Qwen3-{name}"].parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.mlp\.(gate|up)_proj"])
def test_adapters_are_those_that_peft_makes(targets: str | list[str]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    config = Qwen3Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=300,
    )  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(Qwen3ForCausalLM(config), LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM"))
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert from_config(config.to_dict()).adapters(5, targets) == made > 0


# Clusters


def test_clusters() -> None:
    assert parse_cluster("8xH100-80GB") == Cluster(1, 8, GPUS["H100-80GB"])
    assert parse_cluster("2x8xa100-40gb").devices == 16
    assert parse_cluster("1xRTX 4090-24GB").device.memory == 24 * GIB


# Roofline


def test_tokens_per_block_is_the_mean_of_a_simulation() -> None:
    """γ drafts, each kept with probability 1 − tv; the first that is not is replaced, and ends the block."""
    draws, gamma, tv = random.Random(0), 5, 0.3
    lengths = []
    for _ in range(40_000):
        length = 0
        for _ in range(gamma):
            length += 1
            if draws.random() < tv:
                break
        lengths.append(length)
    # The standard error is below sqrt(2.2 / 40,000) = 0.008: five of them.
    assert tokens_per_block(gamma, tv) == pytest.approx(sum(lengths) / len(lengths), abs=0.04)
    assert tokens_per_block(4, 0) == 4 and tokens_per_block(1, 0.9) == pytest.approx(1)


def test_a_pass_is_bound_by_reading_or_by_computing() -> None:
    weights = 28 * (2048 * 128 * 48 + 3 * 2048 * 6144 + 2 * 2048 + 256) + 151_936 * 2048
    cache = 16 * 1000 * 2 * 28 * 8 * 128
    assert pass_seconds(STUDENT, H100, 16, 1000, 1) == pytest.approx(2 * (weights + cache) / 3.35e12)
    assert pass_seconds(STUDENT, H100, 512, 0, 4) == pytest.approx(2 * weights * 2048 / 989e12)


def test_guided_rate_is_tokens_over_passes() -> None:
    passes = 4 * pass_seconds(STUDENT, H100, 8, 500, 1) + pass_seconds(TEACHER, H100, 8, 500, 5)
    expected = 8 * (1 + 0.9 + 0.9**2 + 0.9**3) / passes
    assert guided_rate(STUDENT, TEACHER, H100, 8, 500, 4, 0.1) == pytest.approx(expected)
    assert student_rate(STUDENT, H100, 8, 500) == pytest.approx(8 / pass_seconds(STUDENT, H100, 8, 500, 1))
    assert tv_bound(0.02) == pytest.approx(0.1) and tv_bound(5) == 1


def test_a_step_lasts_until_its_tokens_are_drawn_and_its_longest_response_is() -> None:
    cluster = Cluster(1, 8, H100)
    work = Workload(sequences=256, prompt=1024, response=7168, mean_response=3000, steps=3)
    times = step_time(JOB, work, cluster, None)
    batch = min(32, most_sequences(JOB, 1024 + 1500))
    assert times.rollouts == pytest.approx(32 * 3000 / student_rate(STUDENT, H100, batch, 2524))
    few = replace(work, sequences=8)
    assert step_time(JOB, few, cluster, None).rollouts == pytest.approx(7168 / student_rate(STUDENT, H100, 1, 2524))
    guided = step_time(JOB, work, cluster, 0.1)
    assert guided.step > times.step
    assert run_seconds(JOB, work, cluster, [0.1, None, None]) == pytest.approx(guided.step + 2 * times.step)


# Memory


def test_resident_state_by_hand() -> None:
    parts = resident(JOB)
    assert parts["student weights"] == 4 * (STUDENT.parameters // 8)
    assert parts["optimizer"] == 8 * (STUDENT.parameters // 8)
    assert parts["teacher shards"] == 2 * TEACHER.parameters // 8
    assert resident(replace(JOB, offload_teacher=True))["teacher shards"] == 0


def test_adapters_alone_have_gradients_and_moments() -> None:
    added = 28 * 64 * (2048 * 9 + 2 * 1024 + 3 * 6144)  # q, k, v, o and the three of the MLP, in and out
    assert STUDENT.adapters(64, "all-linear") == added
    job = replace(JOB, adapters=added, micro_batches=2)
    assert resident(job)["optimizer"] == 8 * (added // 8)
    assert resident(job)["student weights"] == 4 * ((STUDENT.parameters + added) // 8)
    assert phases(job)["loss"]["gradients"] == phases(job)["optimizer"]["gradients"] == 4 * added // 8
    frozen = training_flops(STUDENT, TEACHER, True) - training_flops(STUDENT, TEACHER, True, added)
    assert frozen == 2 * (STUDENT.body + STUDENT.head) - 8 * added


def test_the_engine_takes_its_share_and_the_sampler_comes_on_top() -> None:
    parts = engine(JOB)
    sampler = parts.pop("engine: sampler")
    assert sum(parts.values()) == pytest.approx(0.6 * H100.memory, abs=2)
    assert sampler == int(6 * 4 * 256 * 4 * 151_936)
    assert parts["engine: teacher KV cache"] / parts["engine: student KV cache"] == pytest.approx(36 / 28)
    assert most_sequences(JOB, 8192) == kv_budget(JOB) // (2 * 2 * 8 * 128 * (28 + 36) * 8192)
    assert kv_budget(replace(JOB, kv_bytes=10**9)) == pytest.approx(10**9, abs=1)


def test_a_cpu_has_packed_copies_a_student_in_transit_and_slack() -> None:
    on_gpu, on_cpu = replace(JOB, kv_bytes=10**9), replace(JOB, kv_bytes=10**9, host=True)
    more = {name: size - engine(on_gpu).get(name, 0) for name, size in engine(on_cpu).items()}
    heads = {"student": 151_936 * 2048, "teacher": 151_936 * 4096}
    assert STUDENT.tied and not TEACHER.tied  # an embedding packed once more, and where it is the output layer twice
    assert more.pop("engine: student weights") == 2 * 2 * heads["student"]
    assert more.pop("engine: teacher weights") == 2 * heads["teacher"]
    assert more.pop("engine: student in transit") == 2 * (2 * STUDENT.parameters + heads["student"])
    assert not any(more.values())
    parts = phases(replace(on_cpu, sleeps=True))["loss"]
    others = sum(parts[name] for name in ("gradients", "gathered layers", "logits chunk", "activations"))
    assert parts["allocator's slack"] == int(0.3 * others)


@pytest.mark.parametrize("job", [JOB, replace(JOB, host=True, kv_bytes=10**9)], ids=["GPU", "CPU"])
def test_the_largest_micro_batch_fits_and_one_token_more_does_not(job: Job) -> None:
    most = most_micro_tokens(job)
    for tokens, fits in ((most, True), (most + 1, False)):
        assert (sum(phases(replace(job, micro_tokens=tokens))["loss"].values()) <= job.memory) == fits


def test_checkpointing_keeps_one_number_a_hidden_unit_and_layer() -> None:
    kept = activations(JOB, 1000) - activations(replace(JOB, student=replace(STUDENT, layers=27)), 1000)
    assert kept == 1000 * 2 * 2048


def test_sleeping_frees_the_engine_during_the_update() -> None:
    awake = phases(replace(JOB, sleeps=False))
    assert sum(awake["loss"].values()) - sum(phases(JOB)["loss"].values()) == sum(engine(JOB).values())
    assert peak(JOB) == max(sum(parts.values()) for parts in phases(JOB).values())


def test_remedies_are_settings_that_help() -> None:
    small = {"student": KNOWN["Qwen/Qwen3-0.6B"], "teacher": KNOWN["Qwen/Qwen3-4B"]}
    tight = replace(JOB, memory=24 * GIB, reserve=6 * GIB, **small)
    assert "phase 'rollouts' needs" in faults(tight)[0]
    found = remedies(tight)
    assert "actor_rollout_ref.rollout.max_num_seqs=64" in found and not faults(replace(tight, max_num_seqs=64))
    assert not faults(JOB) and remedies(replace(JOB, memory=GIB)) == []


# The command


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("recipe", ["qwen3_1p7b", "qwen3_0p6b", "qwen3_1p7b_lora"])
def test_the_papers_pairs_fit_its_machine(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, f"recipe={recipe}", "cluster=8xH100-80GB")
    assert code == 0 and "it fits" in out
    for word in ("student weights", "optimizer", "teacher shards", "KV cache", "logits chunk", "activations",
                 "gradients", "largest that fits", "tokens/s", "GPU-hours", "400 steps"):  # fmt: skip
        assert word in out


def test_what_cannot_fit_is_refused_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "recipe=qwen3_0p6b", "cluster=1xRTX4090-24GB")
    assert code == 2 and "does not fit" in out and "it would with: " in out and "GPU-hours" not in out
    changes = out.split("it would with: ")[1].splitlines()[0].split()
    code, out, _ = plan(capsys, "recipe=qwen3_0p6b", "cluster=1xRTX4090-24GB", *changes)
    assert code == 0 and "it fits" in out
    code, out, _ = plan(capsys, "recipe=qwen3_1p7b", "cluster=1xRTX4090-24GB")
    assert code == 2 and "more or larger devices" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recipe=qwen3_1p7b"], "No cluster given"),
        (["recipe=qwen3_1p7b", "cluster=8xH1000-80GB"], "did you mean H100-80GB"),
        (["recipe=qwen3_1p7b", "cluster=eight"], "is not of the form 8xH100-80GB"),
        (["recipe=qwen3_1p7b", "cluster=0xH100-80GB"], "is not of the form 8xH100-80GB"),
        (["recipe=qwen3_17b", "cluster=8xH100-80GB"], "did you mean recipe=qwen3_1p7b"),
        (["recipe=qwen3_1p7b", "cluster=8xH100-80GB", "acceptance=2"], "acceptance=2 must be a number from 0.01 to 1"),
        (["recipe=qwen3_1p7b", "cluster=8xH100-80GB", "trb.teacher.path=Qwen/Qwen3-9B"], "did you mean Qwen/Qwen3-"),
        (
            ["recipe=qwen3_1p7b", "cluster=8xH100-80GB", "actor_rollout_ref.rollout.tensor_model_parallel_size=3"],
            "does not divide the 8 devices",
        ),
    ],
)
def test_refusals_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, *arguments)
    assert code == 2 and err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_a_model_folder_gives_its_own_shape(toy: object, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = plan(capsys, *toy.overrides, "cluster=1xL4-24GB")  # type: ignore[attr-defined]
    assert code == 0 and "it fits" in out


def test_this_machine_is_a_cluster() -> None:
    device = parse_cluster("cpu").device
    assert device.flops > 1e9 and device.bandwidth > 1e8 and device.memory > GIB
    assert math.isfinite(device.flops) and isinstance(device, Device)


def test_shapes_are_plain_numbers() -> None:
    assert Shape(1, 2, 1, 1, 4, 10, head_dim=2, tied=False, norms_on_heads=False).parameters == (
        10 * 2 * 2 + 2 + (2 * 2 * 4 + 3 * 2 * 4 + 2 * 2)
    )

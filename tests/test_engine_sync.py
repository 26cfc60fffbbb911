"""Weight syncs: verl's real bucketed transfer, twice; the student becomes the new weights, the teacher stays.

The engine tells both models' log-probabilities itself: at ε = 0 it returns log π_S, at a huge ε log π_T.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import psutil
import pytest
import torch
from engine import STUDENT, BlendedEngine, engine, make_pair, tiny_model
from engine_oracle import next_token_logprobs
from torch import Tensor

BUCKET = 40 * 1024  # bytes: the largest tensor fits, most need a bucket of their own
PROMPTS = torch.randint(3, 128, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()


def sync(blended: BlendedEngine, model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Send a model's state dict as verl's trainer does, from another thread; how many buckets it took."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    weights = [(name, tensor.detach().to(dtype)) for name, tensor in model.state_dict().items()]
    sender = BucketedWeightSender(blended.worker._get_zmq_handle(), bucket_size_mb=1, use_shm=True)
    sender.bucket_size = BUCKET
    thread = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(iter(weights))), daemon=True)
    thread.start()
    buckets = 0
    update = blended.worker._update_weights

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal buckets
        buckets += 1
        update(*args, **kwargs)

    blended.worker._update_weights = counted
    try:
        blended.llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
    finally:
        del blended.worker._update_weights
    thread.join(timeout=60)
    assert not thread.is_alive()
    blended.llm.reset_prefix_cache()
    return buckets


def gaps(blended: BlendedEngine, student: torch.nn.Module | Path, teacher: Path) -> tuple[Tensor, Tensor]:
    """|engine − Hugging Face| of every returned log-probability: the student's and the teacher's."""
    result = []
    for epsilon, model in ((0.0, student), (1e4, teacher)):
        rollouts = blended.rollouts(PROMPTS, epsilon, 10)
        responses = [rollout.token_ids for rollout in rollouts]
        returned_N = torch.tensor([x for rollout in rollouts for x in rollout.logprobs], dtype=torch.float64)
        logp_NV = next_token_logprobs(model, PROMPTS, responses, blended.vocabulary, teacher=epsilon > 0)
        token_N = torch.tensor([token for response in responses for token in response])
        result.append((returned_N - logp_NV.gather(-1, token_N[:, None]).squeeze(-1)).abs())
    return result[0], result[1]


def check_two_syncs(blended: BlendedEngine, tied: bool, dtype: torch.dtype, most: float, mean: float) -> None:
    """After each sync both models answer like Hugging Face's, within float error; the old student does not."""
    pair = blended.pair
    previous: torch.nn.Module | Path = pair.student
    for seed in (101, 102):
        new = tiny_model(seed, tied, **STUDENT).to(dtype).double()
        assert sync(blended, new, dtype) > 3
        student_N, teacher_N = gaps(blended, new, pair.teacher)
        assert student_N.max() < most and student_N.mean() < mean
        assert teacher_N.max() < most and teacher_N.mean() < mean
        stale_N, _ = gaps(blended, previous, pair.teacher)
        assert stale_N.mean() > 0.5
        previous = new


def test_teacher_equal_to_student_then_two_syncs_with_tied_head(tmp_path: Path) -> None:
    """π_T = π_S: every draft is accepted, log μ = log π_S at any ε. Then the student moves, the teacher stays."""
    torch.set_num_threads(1)
    pair = make_pair(tmp_path, tied=True, same=True)
    with engine(pair, draft_tokens=4) as blended:
        torch.manual_seed(0)
        prompts = PROMPTS * 8
        rollouts = blended.rollouts(prompts, 0.1, 12)
        sums = blended.statistics()
        assert sums["tokens"] > 1000
        assert sums["accepted"] == sums["verified"] == sums["tokens"]
        assert sums["tv"] / sums["tokens"] < 1e-5 and sums["kl"] / sums["tokens"] < 1e-6
        responses = [rollout.token_ids for rollout in rollouts]
        returned_N = torch.tensor([x for rollout in rollouts for x in rollout.logprobs], dtype=torch.float64)
        logp_NV = next_token_logprobs(pair.student, prompts, responses, pair.vocabulary)
        token_N = torch.tensor([token for response in responses for token in response])
        assert (returned_N - logp_NV.gather(-1, token_N[:, None]).squeeze(-1)).abs().max() < 5e-5
        check_two_syncs(blended, True, torch.float32, most=1e-4, mean=1e-5)
        blended.statistics()
        blended.rollouts(prompts, 0.1, 12)
        moved = blended.statistics()
        assert moved["accepted"] < 0.95 * moved["verified"]


def test_two_syncs_with_untied_head(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with engine(make_pair(tmp_path), draft_tokens=2) as blended:
        check_two_syncs(blended, False, torch.float32, most=1e-4, mean=1e-5)


def test_released_teacher_gives_its_memory_back(tmp_path: Path) -> None:
    """The process shrinks by the teacher's weights and KV cache; the student, synced again, answers as before; what
    still asks for the teacher is an error.
    """
    torch.set_num_threads(1)
    large = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    pair = make_pair(tmp_path)
    tiny_model(5, **large).save_pretrained(pair.teacher)
    weights = sum(file.stat().st_size for file in pair.teacher.glob("*.safetensors"))
    assert weights > 50e6
    with engine(pair, draft_tokens=2) as blended:
        blended.rollouts(PROMPTS, 0.1, 10)
        blended.llm.reset_prefix_cache()
        blended.llm.collective_rpc("skip_teacher", kwargs={"skipped": True})
        caches = {cache.data_ptr(): cache.nbytes for cache in blended.worker.model_runner.kv_caches}
        process = psutil.Process()
        gc.collect()
        before = process.memory_info().rss
        blended.llm.collective_rpc("release_teacher")
        freed = before - process.memory_info().rss
        kept = {cache.data_ptr(): cache.nbytes for cache in blended.worker.model_runner.kv_caches}
        assert sum(caches.values()) - sum(kept.values()) > 0.5 * sum(caches.values())
        assert freed > 0.9 * weights

        new = tiny_model(7, **STUDENT)
        sync(blended, new, torch.float32)
        rollouts = blended.rollouts(PROMPTS, 0.0, 10)
        responses = [rollout.token_ids for rollout in rollouts]
        logp_NV = next_token_logprobs(new, PROMPTS, responses, pair.vocabulary)
        token_N = torch.tensor([token for response in responses for token in response])
        returned_N = torch.tensor([x for rollout in rollouts for x in rollout.logprobs], dtype=torch.float64)
        assert (returned_N - logp_NV.gather(-1, token_N[:, None]).squeeze(-1)).abs().max() < 1e-4

        blended.llm.collective_rpc("skip_teacher", kwargs={"skipped": False})
        with pytest.raises(RuntimeError, match=r"after trb\.release_teacher had freed its memory"):
            blended.rollouts(PROMPTS[:1], 0.1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_syncs_in_bfloat16(tmp_path: Path, tied: bool) -> None:
    """The engine computes in bfloat16; the oracle has the same rounded weights."""
    torch.set_num_threads(1)
    with engine(make_pair(tmp_path, tied=tied), draft_tokens=2, dtype="bfloat16") as blended:
        check_two_syncs(blended, tied, torch.bfloat16, most=1.0, mean=0.08)


def test_the_resource_tracker_is_not_told_of_the_trainers_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside `untracked_segments` it is told: when that fails, Python or verl has mended it, and the patch can go."""
    from multiprocessing import resource_tracker, shared_memory

    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import rebuild_shared_memory

    from verl_trb.rollout.cpu_reload import untracked_segments

    told: list[tuple[str, str]] = []

    def opened(name: str) -> list[tuple[str, str]]:
        told.clear()
        tensor, segment = rebuild_shared_memory(name, 64)
        del tensor
        segment.close()
        return list(told)

    trainers = shared_memory.SharedMemory(create=True, size=64)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(resource_tracker, "register", lambda *arguments: told.append(arguments))
            assert [kind for _, kind in opened(trainers.name)] == ["shared_memory"]
            with untracked_segments():
                assert opened(trainers.name) == []
                resource_tracker.register("/a", "semaphore")
            assert told == [("/a", "semaphore")]
            assert [kind for _, kind in opened(trainers.name)] == ["shared_memory"]
    finally:
        trainers.close()
        trainers.unlink()

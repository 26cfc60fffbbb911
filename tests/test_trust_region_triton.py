"""The Triton kernel without a GPU: equal to the torch solver in Triton's interpreter, and it compiles for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with vLLM")
TESTS = Path(__file__).parent


def run(*command: str, **variables: str) -> None:
    """A fresh process: Triton decides when it is first imported whether it interprets or compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_equals_the_torch_solver_in_the_interpreter():
    run("-m", "pytest", "kernel_checks.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability, tmp_path):
    run("compile_kernel.py", str(capability), TRITON_CACHE_DIR=str(tmp_path))

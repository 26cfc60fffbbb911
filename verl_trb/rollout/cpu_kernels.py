"""Layer norms on a CPU by vLLM's own C++ kernels, which it has compiled but uses on GPUs only.

In their place vLLM computes a norm with a dozen PyTorch operators: 40 µs for 16 tokens where the kernel takes 5. A
layer of Qwen3 has four norms, and the student's passes are short. Importing this file registers the kernels with
vLLM's operators as the provider `PROVIDER`; the engine's arguments choose it (engine_args.py).
"""

from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

PROVIDER = "cpu_c"

current_platform.import_kernels()  # the library with torch.ops._C


def _fits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


@ir.ops.rms_norm.register_impl(
    PROVIDER,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, weight, epsilon, variance_size=None: _fits(x, weight, variance_size),
)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / sqrt(mean x² + epsilon) · weight over the last dimension; x of any shape, float32 or bfloat16."""
    x = x.contiguous()  # heads are views into one tensor; the kernel reads row after row
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


@ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        _fits(x, weight, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
    ),
    inplace=True,
)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + x_residual), x + x_residual), written over x and x_residual."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def kernel_arguments() -> dict[str, Any]:
    """vLLM arguments that choose these kernels on a CPU; none elsewhere."""
    if not current_platform.is_cpu():
        return {}
    return {"ir_op_priority": {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}}

"""The layer norms of the CPU engine equal vLLM's own, and are still needed."""

import pytest
import torch
from vllm import ir
from vllm.platforms import current_platform

from verl_trb.rollout import cpu_kernels
from verl_trb.rollout.engine_args import blended_engine_args

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # one rounding of a bfloat16 near 4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (16, 512), (7, 4, 64)])
def test_norms_equal_vllms_own(shape, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype)
    native = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-6)
    ours = ir.ops.rms_norm.impls[cpu_kernels.PROVIDER].impl_fn(x, weight, 1e-6)
    torch.testing.assert_close(ours, native, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    expected = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-6)
    written = ir.ops.fused_add_rms_norm.impls[cpu_kernels.PROVIDER].impl_fn(x, residual, weight, 1e-6)
    for got, want in zip(written, expected, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_heads_that_are_views_of_one_tensor():
    """Queries and keys come as parts of the rows of one tensor."""
    torch.manual_seed(0)
    heads = torch.randn(5, 4 * 64)[:, 64:192].view(5, 2, 64)
    weight = torch.rand(64)
    native = ir.ops.rms_norm.impls["native"].impl_fn(heads, weight, 1e-6)
    ours = ir.ops.rms_norm.impls[cpu_kernels.PROVIDER].impl_fn(heads, weight, 1e-6)
    torch.testing.assert_close(ours, native, atol=1e-5, rtol=1e-5)


def test_engine_asks_for_them():
    priority = blended_engine_args("student", 4)["ir_op_priority"]
    assert priority == {"rms_norm": [cpu_kernels.PROVIDER], "fused_add_rms_norm": [cpu_kernels.PROVIDER]}


@pytest.mark.parametrize("operator", ["rms_norm", "fused_add_rms_norm"])
def test_vllm_does_not_use_its_kernels_on_a_cpu_by_itself(operator):
    """When this fails, cpu_kernels.py has become superfluous."""
    current_platform.import_ir_kernels()
    others = {**getattr(ir.ops, operator).impls}
    for known in ("native", cpu_kernels.PROVIDER):
        del others[known]
    assert others and not any(implementation.supported for implementation in others.values())

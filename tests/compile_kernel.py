"""Compiles the solver's kernel for a CUDA device that need not be there: python compile_kernel.py 90"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verl_trb.kernels.trust_region_triton import _blend_kernel

POINTERS = {
    "student": "*fp32",
    "teacher": "*bf16",
    "log_mu": "*fp32",
    "beta_out": "*fp32",
    "kl_out": "*fp32",
    "passes_out": "*i32",
    "epsilons": "*fp32",
    "temperatures": "*fp32",
    "masked": "*u8",
}
SCALARS = {name: "i32" for name in ("student_stride", "teacher_stride", "size", "student_eos", "teacher_eos")}
SIGNATURE = POINTERS | SCALARS | {"tolerance": "fp32", "max_passes": "i32"}

for canonical in (True, False):
    constants = {"MASK": canonical, "MERGE": canonical, "BLOCK": 4096}
    source = ASTSource(_blend_kernel, SIGNATURE | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]

"""Triton kernels: what the pure functions compute, fused for CUDA. Imported only where a GPU is."""

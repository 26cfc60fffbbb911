"""Arithmetic, no measurement: bytes and FLOPs of Qwen3-8B guiding Qwen3-1.7B on one H100, and the best gamma.

    python scripts/h100_arithmetic.py

A decoding pass takes the longer of reading (weights and KV cache once) and computing (2 FLOPs a weight and token),
at the data sheet's peaks: a bound, not a forecast. What is left out: launch overhead, attention's own FLOPs, the
sampler, communication.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH, FLOPS = 3.35e12, 989e12  # H100 SXM: bytes/s, dense bfloat16 FLOP/s
VOCABULARY = 151_936
GAMMAS = range(1, 17)


@dataclass(frozen=True)
class Model:
    """A Qwen3 model in bfloat16, from its published configuration."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128

    @property
    def body(self) -> int:
        """Parameters of the layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def read(self) -> int:
        """Parameters that a decoding pass reads: the layers and the output layer."""
        return self.body + VOCABULARY * self.hidden

    @property
    def kv_bytes(self) -> int:
        """KV cache of one token."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def seconds(self, batch: int, context: int, positions: int) -> float:
        """One pass over `positions` tokens of each of `batch` sequences."""
        reading = (2 * self.read + batch * context * self.kv_bytes) / BANDWIDTH
        return max(reading, 2 * self.read * batch * positions / FLOPS)


STUDENT = Model(layers=28, hidden=2048, heads=16, kv_heads=8, intermediate=6144)
TEACHER = Model(layers=36, hidden=4096, heads=32, kv_heads=8, intermediate=12288)


def tokens_per_block(gamma: int, tv: float) -> float:
    """Expected tokens of a block whose drafts are each accepted with probability 1 - tv; there is no bonus token."""
    return (1 - (1 - tv) ** gamma) / tv


def tokens_per_second(batch: int, context: int, gamma: int, tv: float) -> float:
    # vLLM's target pass has gamma + 1 positions.
    block = gamma * STUDENT.seconds(batch, context, 1) + TEACHER.seconds(batch, context, gamma + 1)
    return batch * tokens_per_block(gamma, tv) / block


def main() -> None:
    for name, model in (("Qwen3-1.7B", STUDENT), ("Qwen3-8B", TEACHER)):
        print(
            f"{name}: {model.read / 1e9:.2f} B parameters read a pass = {2 * model.read / 1e9:.2f} GB ="
            f" {1e3 * 2 * model.read / BANDWIDTH:.2f} ms; {2 * model.read / 1e9:.1f} GFLOP a token;"
            f" KV {model.kv_bytes / 1024:.0f} KiB a token"
        )
    print(f"a pass is bound by reading weights up to {FLOPS / BANDWIDTH:.0f} tokens (without KV cache)")
    print("\nbatch context    TV  student alone  lockstep  best gamma  with it  of the student  gamma 4")
    for batch, context in ((1, 1024), (16, 1024), (64, 1024), (64, 4096), (256, 1024), (256, 4096)):
        for tv in (0.03, 0.1):
            alone = batch / STUDENT.seconds(batch, context, 1)
            lockstep = batch / (STUDENT.seconds(batch, context, 1) + TEACHER.seconds(batch, context, 1))
            best = max(GAMMAS, key=lambda gamma: tokens_per_second(batch, context, gamma, tv))
            speed, four = (tokens_per_second(batch, context, gamma, tv) for gamma in (best, 4))
            print(
                f"{batch:5d} {context:7d}  {tv:4.2f} {alone:14,.0f} {lockstep:9,.0f} {best:11d} {speed:8,.0f}"
                f" {speed / alone:15.0%} {four / alone:8.0%}"
            )

    head = 2 * VOCABULARY * (STUDENT.hidden + TEACHER.hidden) / 1e9
    backward = head + 2 * 2 * VOCABULARY * STUDENT.hidden / 1e9
    models = (6 * STUDENT.body + 2 * TEACHER.body) / 1e9
    print(f"\na training token: {models:.1f} GFLOP in the layers (student forward and backward, teacher forward),")
    print(f"{head + backward:.1f} GFLOP in the loss, of which {head:.1f} computing the logits again in backward")
    rows = 256
    sweep = rows * VOCABULARY * (4 + 2)
    moved = rows * VOCABULARY * 2 + (2.6 + 1) * sweep + rows * VOCABULARY * 4
    print(f"the solver, {rows} rows, 2.6 passes: {moved / 1e9:.2f} GB = {1e3 * moved / BANDWIDTH:.2f} ms")


if __name__ == "__main__":
    main()

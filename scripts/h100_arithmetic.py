"""Arithmetic, no measurement: bytes and FLOPs of Qwen3-8B guiding Qwen3-1.7B on one H100, and the best gamma.

    python scripts/h100_arithmetic.py

The formulas are those of verl_trb/planning/roofline.py, at the data sheet's peaks: a bound, not a forecast.
`python -m verl_trb.plan` applies them to a recipe and a cluster.
"""

from __future__ import annotations

from verl_trb.planning.devices import GPUS
from verl_trb.planning.roofline import guided_rate, pass_seconds, student_rate
from verl_trb.planning.shapes import KNOWN

H100 = GPUS["H100-80GB"]
STUDENT, TEACHER = KNOWN["Qwen/Qwen3-1.7B"], KNOWN["Qwen/Qwen3-8B"]
GAMMAS = range(1, 17)


def main() -> None:
    for name, model in (("Qwen3-1.7B", STUDENT), ("Qwen3-8B", TEACHER)):
        print(
            f"{name}: {model.read / 1e9:.2f} B parameters read a pass = {2 * model.read / 1e9:.2f} GB ="
            f" {1e3 * 2 * model.read / H100.bandwidth:.2f} ms; {2 * model.read / 1e9:.1f} GFLOP a token;"
            f" KV {2 * model.kv_elements / 1024:.0f} KiB a token"
        )
    print(f"a pass is bound by reading weights up to {H100.flops / H100.bandwidth:.0f} tokens (without KV cache)")
    print("\nbatch context    TV  student alone  lockstep  best gamma  with it  of the student  gamma 4")
    for batch, context in ((1, 1024), (16, 1024), (64, 1024), (64, 4096), (256, 1024), (256, 4096)):
        for tv in (0.03, 0.1):
            alone = student_rate(STUDENT, H100, batch, context)
            teacher = pass_seconds(TEACHER, H100, batch, context, 1)
            lockstep = batch / (batch / alone + teacher)
            rates = {gamma: guided_rate(STUDENT, TEACHER, H100, batch, context, gamma, tv) for gamma in GAMMAS}
            best = max(GAMMAS, key=lambda gamma: rates[gamma])
            print(
                f"{batch:5d} {context:7d}  {tv:4.2f} {alone:14,.0f} {lockstep:9,.0f} {best:11d} {rates[best]:8,.0f}"
                f" {rates[best] / alone:15.0%} {rates[4] / alone:8.0%}"
            )

    head = 2 * (STUDENT.head + TEACHER.head) / 1e9
    backward = head + 2 * 2 * STUDENT.head / 1e9
    models = (6 * STUDENT.body + 2 * TEACHER.body) / 1e9
    print(f"\na training token: {models:.1f} GFLOP in the layers (student forward and backward, teacher forward),")
    print(f"{head + backward:.1f} GFLOP in the loss, of which {head:.1f} computing the logits again in backward")
    rows, vocabulary = 256, STUDENT.vocabulary
    sweep = rows * vocabulary * (4 + 2)
    moved = rows * vocabulary * 2 + (2.6 + 1) * sweep + rows * vocabulary * 4
    print(f"the solver, {rows} rows, 2.6 passes: {moved / 1e9:.2f} GB = {1e3 * moved / H100.bandwidth:.2f} ms")


if __name__ == "__main__":
    main()

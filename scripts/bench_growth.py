"""How the cost of rollouts grows, one quantity at a time, against the formula; draws docs/pictures/growth.svg.

    python scripts/bench_growth.py                        # about 6 minutes on 2 cores
    python scripts/bench_growth.py --only epsilon batch   # some of it
    python scripts/bench_growth.py --draw growth.json     # the picture from figures measured before (--json)

Small random models (student 3M, teacher 24M parameters beside their embeddings), bfloat16 where the CPU multiplies
it, else float32, blocks of 4 drafts unless said. The formula is

    seconds a token of one sequence = (drafts * student's pass + teacher's pass + rest) / tokens of a block / batch

with the tokens of a block from epsilon's total variation; each quantity enters it in its own way, said beside its
panel. What is tested is that nothing grows faster than in proportion: the growth exponent, the slope of log cost over
log quantity between the last two points, may not exceed 1 by more than 0.1. Every engine is a process of its own,
with one thread. On a machine in use BENCH_CPU_TIME=1 counts CPU seconds, which of engines side by side say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench_models import Models, make_model, native_dtype
from bench_rollouts import Ours, Side, answer_requests

STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
SIZE, BATCH, RESPONSE, EPSILON, DRAFTS = 32_000, 8, 64, 0.02, 4
REPETITIONS = 3


class Point(NamedTuple):
    """One measurement: what is varied, its value, and everything that defines the engine and the request."""

    quantity: str
    value: float
    teacher_layers: int = TEACHER["num_hidden_layers"]
    size: int = SIZE
    batch: int = BATCH
    response: int = RESPONSE
    epsilon: float = EPSILON
    replicas: int = 1

    @property
    def engine(self) -> tuple[int, int]:
        return self.teacher_layers, self.size


QUANTITIES = {
    "response": "response length, tokens",
    "batch": "sequences in the batch",
    "epsilon": "ε, nats a token",
    "vocabulary": "vocabulary",
    "teacher": "teacher's layers",
    "replicas": "engines, one core each",
}
POINTS = [
    *(Point("response", n, response=n) for n in (64, 128, 256, 512)),
    *(Point("batch", n, batch=n) for n in (1, 2, 4, 8, 16, 32)),
    *(Point("epsilon", x, epsilon=x) for x in (0.002, 0.005, 0.02, 0.05, 0.2, 0.5)),
    *(Point("vocabulary", n, size=n) for n in (8_000, 16_000, 32_000, 64_000, 128_000)),
    *(Point("teacher", n, teacher_layers=n) for n in (4, 8, 16, 32)),
    *(Point("replicas", n, replicas=n) for n in (1, 2)),
]


def make_pair(folder: Path, layers: int, size: int) -> Models:
    """Random models; without tokenizers, which token ids need none of."""
    shapes = {"student": STUDENT, "teacher": {**TEACHER, "num_hidden_layers": layers}}
    for seed, (name, shape) in enumerate(shapes.items()):
        make_model({**shape, **HEADS}, seed, size).save_pretrained(folder / name)
    return Models(folder / "student", folder / "teacher")


def serve(folder: Path, layers: int, size: int) -> None:
    models = make_pair(folder, layers, size)
    batch, response = max(p.batch for p in POINTS), max(p.response for p in POINTS)
    answer_requests(lambda: Ours(models, batch, DRAFTS, native_dtype(), response, size), size)


def measure(points: list[Point]) -> list[dict[str, float]]:
    """Of each point the medians; points of one engine share it."""
    results: dict[Point, dict[str, float]] = {}
    for engine in sorted({point.engine for point in points}):
        mine = [point for point in points if point.engine == engine]
        with tempfile.TemporaryDirectory() as folder:
            sides: list[Side] = []
            try:
                for point in sorted(mine, key=lambda p: p.replicas):
                    while len(sides) < point.replicas:
                        where = Path(folder) / str(len(sides))
                        where.mkdir()
                        command = [__file__, "--serve", str(where), *map(str, engine)]
                        sides.append(Side(command, threads=1, log=where / "log").wait())
                    results[point] = measure_point(point, sides[: point.replicas])
                    print({**point._asdict(), **results[point]}, flush=True)
            finally:
                for side in sides:
                    side.close()
    return [{"value": point.value, **results[point]} for point in points]


def measure_point(point: Point, sides: list[Side]) -> dict[str, float]:
    """All replicas work at the same time, each on its own batch; the first answer of each warms up."""
    request = {"batch": point.batch, "epsilon": point.epsilon, "drafts": DRAFTS, "response": point.response}
    answers: list[dict[str, float]] = []
    for repetition in range(REPETITIONS + 1):
        for side in sides:
            side.send(**request)
        found = [side.answer() for side in sides]
        if repetition:
            answers += found
    median = {name: statistics.median(answer[name] for answer in answers) for name in answers[0]}
    blocks = median["tokens"] * point.batch  # tokens of a step
    return {
        "milliseconds": 1e3 / median["rate"] / point.replicas,  # a token
        "formula": 1e3 * (DRAFTS * median["student_pass"] + median["teacher_pass"]) / blocks / point.replicas,
        "tokens": median["tokens"],
        "tv": median["tv"],
        "sampler": median["sampler"],
    }


def total_cost(quantity: str, row: dict[str, float]) -> float:
    """What may grow in proportion at most: for lengths and batches the whole rollout, else a token."""
    return row["milliseconds"] * (row["value"] if quantity in ("response", "batch") else 1)


def exponent(quantity: str, rows: list[dict[str, float]]) -> float:
    """Slope of log cost over log quantity between the last two points."""
    before, last = rows[-2:]
    return math.log(total_cost(quantity, last) / total_cost(quantity, before)) / math.log(
        last["value"] / before["value"]
    )


def draw(results: dict[str, list[dict[str, float]]], target: Path) -> None:
    """A panel a quantity: milliseconds a token, measured and by the formula."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(9, 5), layout="constrained")
    for panel, (quantity, rows) in zip(panels.flat, results.items(), strict=False):
        values = [row["value"] for row in rows]
        panel.plot(values, [row["milliseconds"] for row in rows], "o-", color="#1f5fa8", label="measured")
        panel.plot(
            values, [row["formula"] for row in rows], "--", color="#c2571a", label="the two models' passes alone"
        )
        panel.set_xscale("log")
        panel.set_xticks(values, [f"{value:g}" if value < 1000 else f"{value / 1000:g}k" for value in values])
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
        panel.set_ylim(0, 1.1 * max(row["milliseconds"] for row in rows))
        panel.set_xlabel(QUANTITIES[quantity])
        panel.set_ylabel("ms a token")
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--json", type=Path, help="the figures, by quantity; what is there already is kept")
    parser.add_argument("--draw", type=Path, help="only draw the figures of this file")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "docs/pictures/growth.svg")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]), int(options.serve[2]))
        return
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.picture)
        return
    points = [point for point in POINTS if point.quantity in options.only]
    measured = measure(points)
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for quantity in options.only:
        results[quantity] = [row for row, point in zip(measured, points, strict=True) if point.quantity == quantity]
    results = {quantity: results[quantity] for quantity in QUANTITIES if quantity in results}
    if options.json:
        options.json.write_text(json.dumps(results))
    draw(results, options.picture)
    worst = 0.0
    print(f"\n{'quantity':10} {'from':>7} {'to':>7}  ms a token: first, last   growth exponent")
    for quantity, rows in results.items():
        grown = exponent(quantity, rows)
        worst = max(worst, grown)
        first, last = rows[0], rows[-1]
        print(
            f"{quantity:10} {first['value']:7g} {last['value']:7g}  {first['milliseconds']:11.3f} "
            f"{last['milliseconds']:8.3f}   {grown:10.2f}"
        )
    sys.exit(1 if worst > 1.1 else 0)


if __name__ == "__main__":
    main()

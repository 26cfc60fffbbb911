"""Methods × seeds: makes the runs, and says what they gained, in a table and a picture.

    python -m verl_trb.compare recipe=quickstart --seeds 5 --arm vanilla trb.policy=student --arm trb
    python -m verl_trb.compare --out runs/compare-quickstart     # the table and the picture of what is there

An arm is a name and the overrides that make it; overrides before the first arm hold for all. The first arm is the
baseline. Each run is the ordinary one, in a folder OUT/ARM/seed-N: a comparison that was stopped goes on where it
was, and finished runs are not repeated. Arms named FAMILY/SETTING are settings of one method; --select keeps the best
of each family by one metric and reports another.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from verl_trb.comparison import Curve, Row, area, common_steps, compare, estimate, markdown, select
from verl_trb.display import duration
from verl_trb.errors import UserError
from verl_trb.report import COLORS, points, read_metrics
from verl_trb.run_folder import exported
from verl_trb.session import INTERRUPTED, run_each, session

Curves = dict[str, dict[int, Curve]]


def run_arms(
    arms: dict[str, list[str]], common: list[str], seeds: Sequence[int], out: Path, jobs: int = 1
) -> list[str]:
    """Makes every run that is not finished, a seed of all arms at a time, `jobs` of them side by side.

    Returns the names of those that failed.
    """
    runs = [(arm, seed) for seed in seeds for arm in arms]
    todo = [run for run in runs if not exported(_folder(out, *run))]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished", flush=True)
    if not todo:
        return []
    commands = []
    for arm, seed in todo:
        folder = _folder(out, arm, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        screen = folder.with_name(f"{folder.name}.log")
        commands.append(([*common, *arms[arm], f"trb.seed={seed}", f"trb.run_dir={folder}"], screen))
    failed, interrupted, started = [], False, time.monotonic()
    with session(commands[0][0], out / "template.log"):
        for number, (index, code) in enumerate(run_each(commands, jobs), start=1):
            (arm, seed), screen = todo[index], commands[index][1]
            print(f"[{number}/{len(todo)}] {arm}, seed {seed}: {'done' if code == 0 else f'FAILED, see {screen}'}"
                  f"   {duration(time.monotonic() - started)} so far", flush=True)  # fmt: skip
            interrupted = interrupted or code in INTERRUPTED
            if code:
                failed.append(f"{arm}, seed {seed}")
    if interrupted:
        raise KeyboardInterrupt
    return failed


def _folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}"


def read_curves(out: Path, arms: Sequence[str], metric: str) -> Curves:
    """arm -> seed -> curve of `metric`, of the finished runs. Raises UserError for a metric that a run lacks."""
    curves: Curves = {arm: {} for arm in arms}
    for arm in arms:
        for folder in sorted((out / arm).glob("seed-*")):
            if not exported(folder):
                continue
            metrics = read_metrics(folder)
            curve = {point.step: point.value for point in points(metrics, metric)}
            if not curve:
                known = sorted({key for row in metrics for key in row if key.startswith("val")})
                raise UserError(f"{folder} has no metric {metric!r}; it has {', '.join(known)}.")
            curves[arm][int(folder.name.removeprefix("seed-"))] = curve
    return curves


def draw(curves: Curves, rows: Sequence[Row], metric: str, out: Path) -> None:
    """Learning curves, mean over seeds with a band of one standard error, and the paired difference of the areas."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from verl_trb.report import LOOK, MARKED

    steps = common_steps([curve for runs in curves.values() for curve in runs.values()])
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(12, 5), dpi=160, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for color, (arm, runs) in zip(COLORS * len(curves), curves.items(), strict=False):
            values = [estimate([curve[step] for curve in runs.values()]) for step in steps]
            means = [value.mean for value in values]
            left.plot(steps, means, color=color, label=f"{arm} ({len(runs)})", **MARKED)
            if len(runs) > 1:
                low = [value.mean - value.error for value in values]
                high = [value.mean + value.error for value in values]
                left.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        left.set_title(f"{metric}, mean ± standard error over seeds", pad=12)
        left.set_xlabel("step")
        left.legend(loc="lower right")
        paired = [row for row in rows if row.differences]
        for place, row in enumerate(paired):
            difference = row.differences["area"]
            color = COLORS[list(curves).index(row.method) % len(COLORS)]
            right.errorbar(difference.mean, place, xerr=difference.margin, color=color, fmt="o", capsize=4)
        right.axvline(0, color="#6b7280", linewidth=0.9)
        right.set_yticks(range(len(paired)), [row.method for row in paired])
        right.set_ylim(max(len(paired), 1) - 0.5, -0.5)
        right.set_title("area under the curve, difference\nfrom the baseline, 95% interval", pad=12)
        figure.savefig(out)


def report(out: Path, arms: Sequence[str], metric: str, select_on: str | None, best: bool) -> str:
    """Writes comparison.md, comparison.json and comparison.png of the finished runs, and returns the table.

    Raises UserError when there is nothing to compare.
    """
    try:
        note = ""
        if select_on:
            chosen = select(read_curves(out, arms, select_on), best)
            arms = [arm for arm in arms if arm in chosen.values()]
            note = f"Settings selected by {select_on}: {', '.join(arms)}.\n\n"
        curves = read_curves(out, arms, metric)
        rows = compare(curves, arms[0], best)
    except ValueError as error:
        raise UserError(f"{out}: {error}") from None
    if best:
        note += (
            f"Best checkpoint: the step at which {metric} itself is highest, as the paper reports; it is chosen on "
            "what it reports, and so too high.\n\n"
        )
    text = (
        f"{metric} in percent, mean ± standard error over seeds; the baseline is {arms[0]}.\n\n{note}{markdown(rows)}"
    )
    (out / "comparison.md").write_text(text)
    numbers = {
        arm: {seed: {"curve": curve, "area": area(curve)} for seed, curve in c.items()} for arm, c in curves.items()
    }
    (out / "comparison.json").write_text(json.dumps({"metric": metric, "runs": numbers}, indent=1) + "\n")
    draw(curves, rows, metric, out / "comparison.png")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m verl_trb.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("common", nargs="*", metavar="OVERRIDE", help="recipe=NAME and overrides for every arm")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "OVERRIDE"),
        help="a method; the first is the baseline",
    )
    parser.add_argument("--seeds", default="1", help="a number of seeds, or a list such as 3,4,5 or 3,")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; 1 leaves each its full speed")
    parser.add_argument("--out", type=Path, help="folder of the comparison; default runs/compare-RECIPE")
    parser.add_argument("--metric", default="val/accuracy", help="what is compared; default val/accuracy")
    parser.add_argument(
        "--select", metavar="METRIC", help="keep the best setting of each FAMILY/SETTING by this metric"
    )
    parser.add_argument(
        "--best-checkpoint", action="store_true", help="each run's best step instead of its last (optimistic)"
    )
    args = parser.parse_intermixed_args(argv)  # overrides may stand anywhere before the first --arm
    try:
        if args.jobs < 1:
            raise UserError(f"--jobs is the number of runs side by side, at least 1; got {args.jobs}.")
        out, arms = _plan(args)
        failed = run_arms(arms, args.common, _seeds(args.seeds), out, args.jobs) if args.common else []
        print("\n" + report(out, list(arms), args.metric, args.select, args.best_checkpoint))
        print(f"written: {out / 'comparison.md'}, comparison.json, comparison.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _plan(args: argparse.Namespace) -> tuple[Path, dict[str, list[str]]]:
    """The comparison's folder and its arms; those of an earlier command where this one names none."""
    recipe = next((item.partition("=")[2] for item in args.common if item.startswith("recipe=")), None)
    if args.out is None and recipe is None:
        raise UserError("Give recipe=NAME and --arm NAME [OVERRIDE ...], or --out FOLDER of an earlier comparison.")
    out = args.out or Path("runs") / f"compare-{recipe}"
    file = out / "arms.json"
    arms = {name: overrides for name, *overrides in args.arm}
    if len(arms) < len(args.arm):
        raise UserError("Two arms have the same name; a comparison needs different ones.")
    if args.common:
        if not arms:
            raise UserError("Name the methods to compare with --arm NAME [OVERRIDE ...]; the first is the baseline.")
        plan = {"common": args.common, "arms": arms}
        if file.exists():
            before = json.loads(file.read_text())
            changed = [a for a in arms if a in before["arms"] and before["arms"][a] != arms[a]]
            if before["common"] != args.common or changed:
                raise UserError(f"{out} holds a comparison with other overrides; give this one a folder with --out.")
            plan["arms"] = {**before["arms"], **arms}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=1) + "\n")
        return out, arms
    if not file.exists():
        raise UserError(f"{out} holds no comparison ({file.name} is missing).")
    known = json.loads(file.read_text())["arms"]
    return out, known


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise UserError(f"--seeds takes a number or a list such as 3,4,5 (3, for one), got {text!r}.") from None
    if len(numbers) == 1 and "," not in text:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds needs at least one seed, all different and not negative; got {text!r}.")
    return numbers


if __name__ == "__main__":
    sys.exit(main())

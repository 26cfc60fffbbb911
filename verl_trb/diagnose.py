"""What a run's rollouts look like to its two models: the diagnostics of arXiv 2605.31159, each a table and a picture.

    python -m verl_trb.diagnose continuation runs/quickstart
    python -m verl_trb.diagnose entropy runs/quickstart
    python -m verl_trb.diagnose auroc runs/quickstart --trained

continuation  rollouts of the student and of the run's policy, cut at t tokens and continued by the student and by the
              teacher: how often that ends well. What a prefix is worth, apart from who walks on.
entropy       the teacher's entropy at each position of the prefixes that the student and the policy visit.
auroc         how well mean(log pi_T - log pi_S) over a rollout ranks right rollouts above wrong ones.

Fresh rollouts are drawn for the run's validation prompts, with the policy as it was in training step --step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_trb.diagnostics.statistics import Interval, auroc, by_position, mean, roc, share
from verl_trb.errors import UserError

Series = dict[str, Any]  # name -> what is drawn


def continuation(pair: Any, step: int, count: int, points: int) -> Series:
    """ "PREFIXES, then WHO" -> {t: success}; a rollout that has ended before t is what it is."""
    from verl_trb.diagnostics.rollouts import student_alone, teacher_alone

    policies = pair.policies(step)
    if len(policies) == 1:
        raise UserError(f"the rollouts of step {step} are the student's own: give a run that guides, or its --step.")
    lengths = sorted({round(place * pair.length / points) for place in range(points)})
    series: Series = {}
    for name, mix in policies.items():
        rollouts = pair.rollouts(count, mix)
        for walker, walk in (("student", student_alone), ("teacher", teacher_alone)):
            curve = series[f"{name} prefixes, then the {walker}"] = {}
            for length in lengths:
                going = [rollout for rollout in rollouts if len(rollout.response) > length]
                prefixes = [rollout.prompt + rollout.response[:length] for rollout in going]
                ends = pair.continuations(prefixes, pair.length - length, walk, seed=length) if going else []
                won = sum(rollout.reward > 0 for rollout in rollouts if len(rollout.response) <= length)
                for rollout, end in zip(going, ends, strict=True):
                    won += pair.reward(rollout.row, rollout.response[:length] + end) > 0
                curve[length] = share(won, count)
    return series


def entropy(pair: Any, step: int, count: int) -> Series:
    """PREFIXES -> the teacher's entropy at each position, averaged over the rollouts that reach it, and in all."""
    series = {}
    for name, mix in pair.policies(step).items():
        scores = pair.scores(pair.rollouts(count, mix))
        positions = by_position([score.teacher_entropy for score in scores])
        # Tokens of one rollout are not independent: rollouts are averaged.
        whole = mean([sum(score.teacher_entropy) / len(score.teacher_entropy) for score in scores])
        series[name] = {"positions": positions, "mean": whole}
    return series


def ranking(pair: Any, step: int, count: int) -> Series:
    """ROLLOUTS -> AUROC of the mean log-ratio, its curve, and the share of right rollouts."""
    series = {}
    for name, mix in pair.policies(step).items():
        rollouts = pair.rollouts(count, mix)
        right = [rollout.reward > 0 for rollout in rollouts]
        ratios = []
        for score in pair.scores(rollouts):
            each = zip(score.logp_teacher, score.logp_student, strict=True)
            ratios.append(sum(teacher - student for teacher, student in each) / len(score.logp_student))
        try:
            area = auroc(ratios, right)
        except ValueError as error:
            raise UserError(f"{name}: {str(error).lower()}") from None
        series[name] = {"auroc": area, "roc": roc(ratios, right), "right": share(sum(right), count)}
    return series


def table(kind: str, series: Series) -> str:
    """The numbers in lines, shares in percent."""

    def percent(value: Interval) -> str:
        return f"{100 * value.value:5.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"

    lines = []
    for name, found in series.items():
        if kind == "continuation":
            lines.append(f"{name}: " + "  ".join(f"t={t} {percent(value)}" for t, value in found.items()))
        elif kind == "entropy":
            whole = found["mean"]
            lines.append(f"{name}: {whole.value:.3f} nats a token [{whole.low:.3f}, {whole.high:.3f}]")
        else:
            area = found["auroc"]
            lines.append(
                f"{name}: AUROC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], "
                f"{percent(found['right'])} % of {area.count} rollouts right"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m verl_trb.diagnose", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=("continuation", "entropy", "auroc"))
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--trained", action="store_true", help="the student the run made, not the one it began with")
    parser.add_argument("--step", type=int, default=1, help="training step whose policy is looked at; default 1")
    parser.add_argument("--rollouts", type=int, default=256, help="rollouts of each kind; default 256")
    parser.add_argument("--points", type=int, default=8, help="lengths t of the continuation probe; default 8")
    parser.add_argument("--batch", type=int, default=256, help="sequences at a time; default 256")
    parser.add_argument("--out", type=Path, help="folder of the results; default RUN/diagnostics")
    args = parser.parse_args(argv)
    try:
        for name in ("step", "rollouts", "points", "batch"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
        from verl_trb.diagnostics.plots import draw
        from verl_trb.diagnostics.rollouts import Pair

        pair = Pair(args.run, args.trained, args.batch)
        if args.kind == "continuation":
            series = continuation(pair, args.step, args.rollouts, args.points)
        else:
            series = {"entropy": entropy, "auroc": ranking}[args.kind](pair, args.step, args.rollouts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.run / "diagnostics"
    out.mkdir(parents=True, exist_ok=True)
    name = f"{args.kind}{'-trained' if args.trained else ''}"
    (out / f"{name}.json").write_text(json.dumps(series, default=asdict, indent=1) + "\n")
    draw(args.kind, series, out / f"{name}.png")
    print(table(args.kind, series))
    print(f"written: {out / name}.png, {name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a recipe needs on a cluster, before anything is bought, booked or started.

    python -m verl_trb.plan recipe=qwen3_1p7b cluster=8xH100-80GB
    python -m verl_trb.plan recipe=qwen3_1p7b cluster=8xH100-80GB mean_response=3000 trb.loss_chunk_tokens=512
    python -m verl_trb.plan recipe=quickstart cluster=cpu

cluster=         NxNAME-MEM, NODESxNxNAME-MEM or cpu (this machine)
mean_response=   tokens of a response on average; default half of data.max_response_length
acceptance=      share of drafts that are kept; default what epsilon guarantees, 1 - sqrt(epsilon / 2)
efficiency=      share of the data sheet's peaks that is reached; default 0.4

Everything else is what `python -m verl_trb.main` takes. Memory by part, the largest batches, times and GPU-hours; exit
code 2 with what to change if it does not fit. Arithmetic (docs/planning.md): no GPU, no download, no Ray.
"""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_trb import composition
from verl_trb.errors import UserError
from verl_trb.planning.devices import CPU, Cluster, parse_cluster
from verl_trb.planning.job import Workload, job_of, workload_of
from verl_trb.planning.memory import Job, kv_budget, most_micro_tokens, most_sequences, phases
from verl_trb.planning.remedies import faults, remedies
from verl_trb.planning.roofline import tokens_per_block, tv_bound
from verl_trb.planning.times import run_seconds, step_time

WIDTH = 110
OWN = ("cluster", "mean_response", "acceptance", "efficiency")
# Of policies without a trust region nothing is known beforehand.
ASSUMED_ACCEPTANCE = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (by default this process's). Returns the exit code: 0, or 2 for what does not fit or is
    refused.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print((__doc__ or "").strip())
        return 0
    own = dict(item.split("=", 1) for item in given if item.startswith(tuple(f"{name}=" for name in OWN)))
    rest = [item for item in given if item.partition("=")[0] not in own]
    try:
        if "cluster" not in own:
            raise UserError("No cluster given; for example cluster=8xH100-80GB, cluster=1xRTX4090-24GB or cluster=cpu.")
        cluster = parse_cluster(own["cluster"])
        mean_response = _number(own, "mean_response", 1, 10**9)
        settings = {
            "mean_response": int(mean_response) if mean_response else None,
            "acceptance": _number(own, "acceptance", 0.01, 1),
            "efficiency": _number(own, "efficiency", 0.01, 1) or (1.0 if own["cluster"] == CPU else 0.4),
        }
        return composition.run(lambda config: show(config, cluster, **settings), rest)  # type: ignore[arg-type]
    except UserError as error:
        text = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
        Console(stderr=True, soft_wrap=True, highlight=False).print(text)
        return 2


def show(
    config: DictConfig, cluster: Cluster, mean_response: int | None, acceptance: float | None, efficiency: float
) -> int:
    """Prints the plan of a composed configuration. Returns 2 if it does not fit, else 0."""
    _fill_in_prepared(config)
    with open_dict(config):
        config.trainer.nnodes, config.trainer.n_gpus_per_node = cluster.nodes, cluster.per_node
    job, work = job_of(config, cluster), workload_of(config, mean_response)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    devices = "this machine" if cluster.device.name == CPU else f"{cluster.devices} × {cluster.device.name}"
    name = config.trb.recipe + (f", method {config.trb.method}" if config.trb.method else "")
    console.print(
        Text.assemble("Plan of recipe ", (name, "bold cyan"), f" on {devices}: arithmetic, nothing is started")
    )
    wrong = faults(job)
    tables = [_memory(job), _batches(job, work)]
    if not wrong:
        tables.append(_times(config, job, work, cluster, acceptance, efficiency))
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for text in wrong:
        console.print(Text.assemble(("does not fit: ", "bold red"), f"{text}."), soft_wrap=True)
    if wrong:
        found = remedies(job)
        for override in found:
            console.print(Text.assemble(("it would with: ", "yellow"), override), soft_wrap=True)
        if not found:
            hint = "none of the settings known here is enough: more or larger devices, or smaller models"
            console.print(Text.assemble(("what to change: ", "yellow"), hint), soft_wrap=True)
    else:
        console.print(Text("it fits", "green"))
    return 2 if wrong else 0


def _number(own: dict[str, str], name: str, low: float, high: float) -> float | None:
    if name not in own:
        return None
    try:
        value = float(own[name])
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise UserError(f"{name}={own[name]} must be a number from {low:g} to {high:g}.")
    return value


def _fill_in_prepared(config: DictConfig) -> None:
    """Paths of a recipe whose models a task makes: they must have been made, for their shapes to be known."""
    if config.trb.prepare:
        from verl_trb.dry_run import fill_in_prepared

        if notes := fill_in_prepared(config):
            raise UserError(
                f"{notes[0]}; a plan needs them: run the recipe once, or name models and set trb.prepare=null."
            )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(
            column, style="bright_black" if number == 0 else "", justify="left" if number == 0 else "right"
        )
    return table


def _memory(job: Job) -> Table:
    by_phase = phases(job)
    table = _table("Memory of a device, GiB", "", *by_phase)
    for part in dict.fromkeys(part for parts in by_phase.values() for part in parts):
        sizes = [parts.get(part, 0) for parts in by_phase.values()]
        if any(sizes):
            table.add_row(part, *(_gib(size) if size else "" for size in sizes))
    totals = [sum(parts.values()) for parts in by_phase.values()]
    styled = [Text(_gib(total), "bold red" if total > job.memory else "bold") for total in totals]
    table.add_row(Text("in all", "bold"), *styled)
    table.add_row("of the device's", *[_gib(job.memory)] * len(totals))
    return table


def _batches(job: Job, work: Workload) -> Table:
    table = _table("Batches", "", "set", "largest that fits")
    mean = work.prompt + work.mean_response
    full, average = (f"{most_sequences(job, length):,}" for length in (job.length, mean))
    table.add_row(f"sequences at once (max_num_seqs), all of {job.length:,} tokens", f"{job.max_num_seqs:,}", full)
    table.add_row(f"the same, of {mean:,} tokens on average", f"{job.max_num_seqs:,}", average)
    table.add_row("tokens of a micro-batch", f"{job.micro_tokens:,}", f"{most_micro_tokens(job):,}")
    table.add_row("KV cache, tokens", f"{kv_budget(job) // job.kv_token:,}", "")
    return table


def _times(
    config: DictConfig, job: Job, work: Workload, cluster: Cluster, acceptance: float | None, efficiency: float
) -> Table:
    steps = work.steps or 1
    kinds = _kinds(config, steps, acceptance)
    shown: dict[str, float | None] = {}
    for step in (1, *(step for step in range(2, steps + 1) if (kinds[step - 1] is None) != (kinds[step - 2] is None))):
        tv = kinds[step - 1]
        what = "student alone" if tv is None else f"guided, {1 - tv:.0%} kept"
        shown[f"step {step}: {what}"] = tv
    real = "" if efficiency == 1 else f" (and at {efficiency:.0%} of the peaks)"
    table = _table(
        f"Time, at the {'speed measured just now' if job.host else 'peaks of the data sheet'}{real}", "", *shown
    )
    times = [step_time(job, work, cluster, tv) for tv in shown.values()]

    def both(value: float, unit: str) -> str:
        return f"{_short(value)} {unit}" + ("" if efficiency == 1 else f" ({_short(value / efficiency)})")

    tokens = [job.draft_tokens if tv is None else tokens_per_block(job.draft_tokens, tv) for tv in shown.values()]
    guided = [f"{n:.2f}" if tv is not None else "" for n, tv in zip(tokens, shown.values(), strict=True)]
    if any(guided):
        table.add_row(f"tokens per teacher pass, γ = {job.draft_tokens}", *guided)
    rates = [f"{_short(t.rate)}" + ("" if efficiency == 1 else f" ({_short(t.rate * efficiency)})") for t in times]
    table.add_row(f"rollouts, tokens/s, {work.mean_response:,} a response", *rates)
    table.add_row("rollouts", *(both(t.rollouts, "s") for t in times))
    table.add_row("teacher and update", *(both(t.update, "s") for t in times))
    table.add_row("step", *(Text(both(t.step, "s"), "bold") for t in times))
    if work.steps:
        hours = run_seconds(job, work, cluster, kinds) / 3600
        if job.host:
            table.add_row(f"{steps:,} steps", both(60 * hours, "min"))
        else:
            table.add_row(f"{steps:,} steps", both(hours, "h"))
            table.add_row(f"{steps:,} steps, GPU-hours", Text(both(hours * cluster.devices, "h"), "bold"))
        table.caption = "without validation, checkpoints, weight syncs, communication and start-up"
        table.caption_justify = "left"
    return table


def _kinds(config: DictConfig, steps: int, acceptance: float | None) -> list[float | None]:
    """For each step the total variation of its rollouts, None where the teacher does not take part."""
    from verl_trb.guidance import guidance, step_policy
    from verl_trb.policies import get_policy

    kinds: list[float | None] = []
    for step in range(1, steps + 1):
        values = guidance(config.trb, step)
        if values is None or not get_policy(step_policy(config.trb, step)).needs_teacher:
            kinds.append(None)
        elif acceptance is not None:
            kinds.append(1 - acceptance)
        else:
            kinds.append(tv_bound(values["epsilon"]) if "epsilon" in values else 1 - ASSUMED_ACCEPTANCE)
    return kinds


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())

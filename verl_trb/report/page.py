"""The report as one HTML page that needs no network: no script, the style and every picture within it.

Whatever comes from a run (texts of models, names of folders, settings) is escaped: a rollout that contains HTML shows
as text.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path

from verl_trb.gantt import draw_gantt
from verl_trb.report import panels
from verl_trb.report.figures import WIDE, inline_svg
from verl_trb.report.metrics import Metrics, Summary, bounded, read_metrics, run_names, summary
from verl_trb.report.picture import draw_report
from verl_trb.report.samples import Sample, read_samples
from verl_trb.report.settings import differences
from verl_trb.timeline import read_timeline, typical

PAGE, PICTURE, DETAILS = "report.html", "report.png", "report-details.png"
STUDENT = "student"


def write_report(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Writes `report.html`, `report.png` and `report-details.png` of some runs into `folder`, and returns their paths.

    Raises ValueError as `read_metrics`.
    """
    html = page(run_dirs)
    folder.mkdir(parents=True, exist_ok=True)
    draw_report(run_dirs, folder / PICTURE)
    draw_report(run_dirs, folder / DETAILS, panels.DETAILS)
    unfinished = folder / f"{PAGE}.part"  # a browser never sees half a page
    unfinished.write_text(html, encoding="utf-8")
    os.replace(unfinished, folder / PAGE)
    return [folder / name for name in (PAGE, PICTURE, DETAILS)]


def page(run_dirs: Sequence[Path]) -> str:
    """The whole page. Raises ValueError as `read_metrics`."""
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    names = run_names(run_dirs)
    title = "Trust-region behavior blending" if any(map(bounded, runs)) else "On-policy distillation"
    css = importlib.resources.files("verl_trb.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [
        f"<h1>{title}</h1>",
        _table_of_runs(names, [summary(run) for run in runs], run_dirs),
        _figures(runs),
        _timelines(names, run_dirs),
        _samples(names, [read_samples(run_dir) for run_dir in run_dirs]),
        _differences(names, run_dirs),
        "<footer>Written by <code>python -m verl_trb.report</code>; what each number means: docs/metrics.md.</footer>",
    ]
    body = "\n".join(filter(None, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched and nothing runs, whatever the page came to contain.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{escape(', '.join(names))}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table_of_runs(names: Sequence[str], summaries: Sequence[Summary], run_dirs: Sequence[Path]) -> str:
    rows = []
    for i, (name, s, run_dir) in enumerate(zip(names, summaries, run_dirs, strict=True)):
        first, last, best = s.accuracy_first, s.accuracy_last, s.accuracy_best
        cells = [
            str(s.steps),
            f"{first.value:.1%} → {last.value:.1%}" if first and last else "",
            f"{best.value:.1%} at step {best.step}" if best else "",
            f"{s.reverse_kl_first.value:.3g} → {s.reverse_kl_last.value:.3g}"
            if s.reverse_kl_first and s.reverse_kl_last
            else "",
            f"{s.acceptance:.1%}" if s.acceptance is not None else "",
            f"{s.step_seconds:.3g} s" if s.step_seconds is not None else "",
            _duration(s.total_seconds) if s.total_seconds is not None else "",
            f"{s.total_tokens:,}" if s.total_tokens is not None else "",
        ]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        folder = escape(str(Path(run_dir).resolve()))
        rows.append(
            f'<tr><td class="run" style="--color: {_color(i)}" title="{folder}">{escape(name)}</td>{numbers}</tr>'
        )
    heads = ("run", "steps", "accuracy", "best", "reverse KL, nats", "acceptance", "a step", "in all", "tokens")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _figures(runs: Sequence[Metrics]) -> str:
    drawn = [inline_svg(partial(draw, runs=runs), draw.__name__) for draw in (*panels.SUMMARY, *panels.DETAILS)]
    return f'<h2>Curves</h2>\n<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in drawn)}</div>'


def _timelines(names: Sequence[str], run_dirs: Sequence[Path]) -> str:
    """Of each run that recorded it, one step: who worked when."""
    blocks = []
    for i, (name, run_dir) in enumerate(zip(names, run_dirs, strict=True)):
        if steps := read_timeline(run_dir):
            head = f'<h3 class="run" style="--color: {_color(i)}">{escape(name)}</h3>' if len(names) > 1 else ""
            svg = inline_svg(partial(draw_gantt, step=typical(steps)), f"timeline{i}", WIDE)
            blocks.append(f'{head}<div class="timeline"><figure>{svg}</figure></div>')
    hint = "Who worked when in the step of median length; any other step: <code>python -m verl_trb.gantt</code>."
    return f'<h2>One step</h2>\n<p class="hint">{hint}</p>\n{"".join(blocks)}' if blocks else ""


def _samples(names: Sequence[str], samples: Sequence[list[Sample]]) -> str:
    """Prompt by prompt, every run's samples step by step: the student beside the policy that guided the step."""
    prompts = list(dict.fromkeys(sample.prompt for run in samples for sample in run))
    if not prompts:
        return ""
    blocks = []
    for prompt in prompts:
        inside = []
        for i, (name, run) in enumerate(zip(names, samples, strict=True)):
            here = [sample for sample in run if sample.prompt == prompt]
            if here and len(names) > 1:
                inside.append(f'<h3 class="run" style="--color: {_color(i)}">{escape(name)}</h3>')
            for step, group in groupby(here, key=lambda sample: sample.step):
                cells = "".join(f"<div>{_sample(sample)}</div>" for sample in group)
                inside.append(f'<h3>Step {step}</h3><div class="pair">{cells}</div>')
        is_open = " open" if prompt is prompts[0] else ""
        shown = escape(prompt if len(prompt) <= 400 else prompt[:400] + " …")
        blocks.append(f"<details{is_open}><summary><code>{shown}</code></summary>{''.join(inside)}</details>")
    hint = (
        "Drawn at the beginning of a step, for the same prompts each time. Where a draft of the student's was "
        "rejected, it is <del>struck out</del> and its <ins>correction</ins> follows; everything else the "
        "student wrote itself."
    )
    return f'<h2>Rollouts</h2>\n<p class="hint">{hint}</p>\n{"".join(blocks)}'


def _sample(sample: Sample) -> str:
    corrections, length = sum(sample.corrected), len(sample.tokens)
    about = [f"<b>{escape(sample.policy)}</b>", f"{length} tokens"]
    if sample.policy != STUDENT:
        about += [f"{corrections} corrected", f"log μ − log π<sub>S</sub> {sample.log_ratio:+.3f} a token"]
    if not sample.finished:
        about.append("cut at its limit")
    text = []
    for token, corrected, draft, student, mu in zip(
        sample.tokens, sample.corrected, sample.drafts, sample.logp_student, sample.log_mu, strict=True
    ):
        if corrected:
            said = f"the student's draft was rejected; log π_S {student:.2f}, log μ {mu:.2f}"
            text.append(f'<del>{escape(draft or "")}</del><ins title="{escape(said)}">{escape(token)}</ins>')
        else:
            text.append(escape(token))
    return f'<span class="who">{", ".join(about)}</span><div class="tokens">{"".join(text)}</div>'


def _differences(names: Sequence[str], run_dirs: Sequence[Path]) -> str:
    """The settings in which several runs differ."""
    if len(run_dirs) < 2:
        return ""
    different = differences(run_dirs)
    if not different:
        return '<h2>Settings</h2>\n<p class="hint">All runs have the same settings.</p>'
    head = "".join(f'<th class="run" style="--color: {_color(i)}">{escape(n)}</th>' for i, n in enumerate(names))
    rows = "".join(
        f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for key, values in different.items()
    )
    return (
        '<h2>Settings</h2>\n<p class="hint">Where the runs\' settings differ.</p>\n'
        f'<div class="wide"><table class="differences"><tr><th>key</th>{head}</tr>{rows}</table></div>'
    )


def _color(run: int) -> str:
    return f"var(--run{run % len(panels.COLORS)})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"

"""Draws the pictures of docs/how_it_works.md from the functions that the engine uses.

    python scripts/draw_concepts.py

Shapes: V tokens of one prefix.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from verl_trb.report import COLORS, LOOK
from verl_trb.trust_region import blend

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
EPSILON = 0.1
STUDENT, TEACHER, BLEND = COLORS[0], COLORS[1], "#374151"
# One prefix, made up: the student likes a wrong token that the teacher all but excludes.
STUDENT_V = torch.tensor([0.34, 0.26, 0.16, 0.10, 0.08, 0.06], dtype=torch.float64)
TEACHER_V = torch.tensor([0.02, 0.62, 0.24, 0.06, 0.04, 0.02], dtype=torch.float64)


def figure(width: float, height: float) -> Figure:
    made = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def trust_region(file: Path) -> None:
    """One prefix: both models and their blend; KL(mu || pi_S) and KL(mu || pi_T) over beta."""
    logp_V, logq_V = STUDENT_V.log(), TEACHER_V.log()
    best = blend(logp_V[None], logq_V[None], EPSILON)
    drawn = figure(11, 3.6)
    bars, curve = drawn.subplots(1, 2, width_ratios=(3, 2))
    places = torch.arange(len(STUDENT_V))
    for shift, heights_V, color, label in (
        (-0.27, STUDENT_V, STUDENT, "student π_S"),
        (0.0, best.log_mu[0].exp(), BLEND, f"rollouts μ, ε = {EPSILON}"),
        (0.27, TEACHER_V, TEACHER, "teacher π_T"),
    ):
        bars.bar(places + shift, heights_V, width=0.25, color=color, label=label)
    bars.set_xticks(places, [f"token {i}" for i in range(1, len(STUDENT_V) + 1)])
    bars.set_title("probabilities at one prefix")
    bars.legend()
    betas = torch.linspace(0, 1, 101, dtype=torch.float64)
    log_mu_BV = ((1 - betas)[:, None] * logp_V + betas[:, None] * logq_V).log_softmax(-1)
    for other_V, color, label in ((logp_V, STUDENT, "KL(μ‖π_S)"), (logq_V, TEACHER, "KL(μ‖π_T)")):
        curve.plot(betas, (log_mu_BV.exp() * (log_mu_BV - other_V)).sum(-1), color=color, label=label)
    curve.axhline(EPSILON, color="#6b7280", linewidth=0.9, linestyle="--")
    curve.text(0.99, EPSILON * 1.06, "ε", ha="right", color="#6b7280")
    beta, kl = float(best.beta), float(best.kl)
    curve.plot([beta], [kl], "o", color=BLEND)
    curve.annotate(
        f"β = {float(best.beta):.2f}", (float(best.beta), float(best.kl)), (8, -14), textcoords="offset points"
    )
    curve.set_xlabel("β, the teacher's weight")
    curve.set_title("what the teacher's weight costs, nats")
    curve.legend()
    drawn.savefig(file, metadata={"Date": None})


def block(file: Path) -> None:
    """A block of four drafts, the third rejected: what is kept, corrected and dropped."""
    drawn = figure(11, 3.1)
    panel = drawn.subplots()
    panel.set_xlim(0, 11)
    panel.set_ylim(0, 3.3)
    panel.axis("off")
    kept, rejected, ignored = "#15803d", "#b91c1c", "#9ca3af"
    verdicts = ["kept", "kept", "rejected", "not looked at"]
    rows = {
        "student drafts": (2.35, ["d₁", "d₂", "d₃", "d₄"], [STUDENT] * 4),
        "teacher reads, μ at each position": (1.35, verdicts, [kept, kept, rejected, ignored]),
        "rollout": (0.35, ["d₁", "d₂", "c ~ (μ − π_S)₊", ""], [kept, kept, TEACHER, ignored]),
    }
    panel.text(3.2, 3.1, "prefix", ha="center", color="#6b7280", fontsize=9)
    for label, (height, texts, colors) in rows.items():
        panel.text(2.45, height + 0.27, label, ha="right", va="center")
        panel.add_patch(FancyBboxPatch((2.7, height), 1.0, 0.55, boxstyle="round,pad=0.03", color="#e5e7eb"))
        for i, (text, color) in enumerate(zip(texts, colors, strict=True)):
            if text:
                box = FancyBboxPatch((4.0 + 1.75 * i, height), 1.5, 0.55, boxstyle="round,pad=0.03", color=color)
                panel.add_patch(box)
                panel.text(4.75 + 1.75 * i, height + 0.27, text, ha="center", va="center", color="white", fontsize=9)
    panel.text(4.0, 0.02, "every token of the rollout is distributed as μ at its prefix", color="#6b7280", fontsize=9)
    drawn.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context({**LOOK, "svg.hashsalt": "verl_trb"}):
        trust_region(FOLDER / "trust_region.svg")
        block(FOLDER / "block.svg")

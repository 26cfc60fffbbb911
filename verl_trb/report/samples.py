"""The few rollouts that a run keeps, samples.jsonl: the student's and the guided policy's, at the same prompts.

One JSON object a line, with one entry a token in `tokens`, `corrected`, `drafts`, `logp_student` and `log_mu`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One rollout at one step.

    policy: the rollout policy's name, `student` for the student alone.
    tokens: the text of each token.
    corrected: whether the token replaced a draft of the student's that was rejected.
    drafts: that draft's text, null where nothing was replaced.
    logp_student, log_mu: log-probabilities of the token in nats, of the student and of the rollout policy.
    finished: whether the rollout ended by itself, not at its limit of tokens.
    """

    step: int
    prompt: str
    policy: str
    tokens: list[str]
    corrected: list[bool]
    drafts: list[str | None]
    logp_student: list[float]
    log_mu: list[float]
    finished: bool

    @property
    def log_ratio(self) -> float:
        """Mean of log mu - log pi_S, nats a token."""
        pairs = zip(self.log_mu, self.logp_student, strict=True)
        return sum(mu - student for mu, student in pairs) / max(len(self.tokens), 1)


def read_samples(run_dir: Path) -> list[Sample]:
    """The samples of a run by step, in the order they were written; [] where it kept none.

    A resumed run writes some steps again: the last ones count, and what cannot be read (half a line) is left out.
    """
    try:
        lines = (Path(run_dir) / SAMPLES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[tuple[int, str, str], Sample] = {}
    for line in lines:
        try:
            row = json.loads(line)
            sample = Sample(**{field.name: row[field.name] for field in fields(Sample)})
            columns = (sample.corrected, sample.drafts, sample.logp_student, sample.log_mu)
            if any(len(column) != len(sample.tokens) for column in columns):
                continue
        except (ValueError, TypeError, KeyError):
            continue
        found[sample.step, sample.prompt, sample.policy] = sample
    return sorted(found.values(), key=lambda sample: sample.step)

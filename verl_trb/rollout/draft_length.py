"""How many tokens the student drafts in the next block: what gave the most tokens a second so far.

    tokens of a block of γ drafts = 1 + p + … + p^(γ−1),    p: share of the drafts that were accepted
    seconds of a step = (a + b·γ + c·B + d·B·γ) · r[γ],     fitted to the measured steps

The choice is made before a block is drafted, from blocks that are done. Given everything that happened before, the
coupling draws every token of a block from μ, whatever the block's length; so a length that depends on nothing later
leaves the distribution as it is. A length that depended on the block's own drafts would not: stopping where a draft
looks unlikely, say, would keep the others too often. Pure numbers: no vLLM. B is the number of requests.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

# What one more block forgets of the older ones: about the last 500 drafts and the last 100 steps count.
ACCEPTANCE_MEMORY, COST_MEMORY = 0.998, 0.99
# Of every EXPLORE steps two try a neighbour of the best length: the first starts with it, the second is measured.
EXPLORE = 32
BESIDE_RATE = 0.3  # of the last step in the average of r[γ]
# Steps a number of requests needs before its measurements count, spread over all lengths.
FIRST = 3
OUTLIER = 3.0  # times the expected seconds: something else had the machine, or a shape was new to a library


class StepCosts:
    """Seconds of a step for numbers of requests within a factor of two: least squares with forgetting, and what each
    length measured takes beside the fit: the teacher's pass has a kink where computing starts to bind.
    """

    def __init__(self, longest: int) -> None:
        self.moments, self.target = np.zeros((4, 4)), np.zeros(4)
        self.beside = np.ones(longest + 1)  # r, by length
        self.steps = 0

    @staticmethod
    def features(rows: int, drafts: int | np.ndarray) -> np.ndarray:
        one = np.ones_like(drafts, dtype=float)
        return np.stack([one, drafts * one, rows * one, rows * drafts * one], axis=-1)

    def add(self, rows: int, drafts: int, seconds: float) -> None:
        fitted = float(self._fit(rows, drafts)) if self.steps > 2 * FIRST else 0.0
        if self.steps > 4 * FIRST and seconds > OUTLIER * fitted * self.beside[drafts]:
            return
        x = self.features(rows, drafts)
        self.moments = COST_MEMORY * self.moments + np.outer(x, x)
        self.target = COST_MEMORY * self.target + x * seconds
        self.steps += 1
        if fitted:
            self.beside[drafts] += BESIDE_RATE * (seconds / fitted - self.beside[drafts])

    def seconds(self, rows: int, drafts: int | np.ndarray) -> np.ndarray:
        return self._fit(rows, drafts) * self.beside[drafts]

    def _fit(self, rows: int, drafts: int | np.ndarray) -> np.ndarray:
        # Few numbers of requests leave directions open: a small ridge, in units in which all features are alike.
        scale = np.sqrt(np.diag(self.moments)) + 1e-12
        normal = self.moments / np.outer(scale, scale) + 1e-6 * np.eye(4)
        weights = np.linalg.solve(normal, self.target / scale) / scale
        return np.maximum(self.features(rows, drafts) @ weights, 1e-6)


class DraftLength:
    """Chooses γ from 1 … `longest`; `fixed` (settable) is taken as it is."""

    def __init__(self, longest: int, fixed: int | None = None) -> None:
        self.longest, self.fixed = longest, fixed
        self.lengths = np.arange(1, longest + 1)
        self.accepted, self.verified = 0.0, 0.0
        self.costs: dict[int, StepCosts] = defaultdict(lambda: StepCosts(longest))
        self.choices: dict[int, int] = defaultdict(int)

    def saw_block(self, drafts: int, emitted: int) -> None:
        """A block of `drafts` drafts gave `emitted` tokens, of which the last may be a correction.

        Of a whole block that is not known, and its last place is left out.
        """
        if drafts < 2 or emitted < 1:
            return
        kept = emitted - 1
        self.accepted = ACCEPTANCE_MEMORY * self.accepted + kept
        self.verified = ACCEPTANCE_MEMORY * self.verified + kept + (emitted < drafts)

    def saw_step(self, rows: int, drafts: int, seconds: float) -> None:
        """A whole step of the engine: `drafts` verified and `drafts` drafted for each of `rows` requests."""
        self.costs[rows.bit_length()].add(rows, drafts, seconds)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted so far; optimistic before anything is known."""
        return (self.accepted + 9) / (self.verified + 10)

    def tokens(self) -> np.ndarray:
        """Expected tokens of a block of each length."""
        return np.cumsum(self.acceptance ** (self.lengths - 1))

    def choose(self, rows: int) -> int:
        if self.fixed is not None or self.longest == 1:
            return self.fixed or self.longest
        octave = rows.bit_length()
        turn, self.choices[octave] = self.choices[octave], self.choices[octave] + 1
        costs = self.costs[octave]
        if costs.steps < 2 * FIRST:  # long and short ones in turns, each long enough to be measured
            return int((self.longest, (self.longest + 1) // 2)[turn // (FIRST + 1) % 2])
        best = int(np.argmax(self.tokens() / costs.seconds(rows, self.lengths))) + 1
        trial = turn % (2 * EXPLORE)
        if trial % EXPLORE < 2:
            best += 1 if trial < EXPLORE else -1
        return int(np.clip(best, 1, self.longest))

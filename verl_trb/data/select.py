"""Which rows of a data set are used: those with one question and an answer that the reward function can check.

Of a training set's copies of one question the first is used; if copies disagree about the answer, none is. An
evaluation set keeps every row that can be read, because its size is part of the result; two rows with one id are
refused.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from verl_trb.data.files import Row
from verl_trb.data.overlap import EvaluationSets, Match, normalized
from verl_trb.data.shapes import Example, Fault, Shape, find_shape, read_example
from verl_trb.data.sources import Source
from verl_trb.errors import UserError

NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class Kept:
    """A row to be used. position: its number among all rows read; match: the evaluation question that it is."""

    row: Row
    position: int
    example: Example
    match: Match | None = None

    @property
    def question_key(self) -> str:
        return normalized(self.example.question)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used. why: the kind of reason, by which they are counted; detail: about this row."""

    row: Row
    why: str
    detail: str = ""
    match: Match | None = None


@dataclass
class Selection:
    """kept: in the order of the output; read: rows seen; complete: whether these are all rows there are."""

    kept: list[Kept] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    read: int = 0
    complete: bool = True

    @property
    def matches(self) -> list[Match]:
        """Training questions that are in an evaluation set: those kept, then those dropped for it."""
        matches = [kept.match for kept in self.kept] + [dropped.match for dropped in self.dropped]
        return [match for match in matches if match is not None]

    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason, most first."""
        return dict(Counter(dropped.why for dropped in self.dropped).most_common())


@dataclass(frozen=True)
class Choice:
    """How rows are chosen.

    limit: rows wanted, None for all. shuffle: a seed; the rows are then ordered by a hash of seed and question,
    which depends on no order of the input. verifies: whether an answer can be checked, None to skip that. same: whether
    two answers are, where their texts differ. too_long: whether a question makes too long a prompt, None to skip that.
    evaluation_sets: where to look training questions up. drop_overlap: "", "exact" or "near" (which includes exact).
    """

    limit: int | None = None
    shuffle: int | None = None
    question_column: str | None = None
    answer_column: str | None = None
    verifies: Callable[[str], bool] | None = None
    same: Callable[[str, str], bool] | None = None
    too_long: Callable[[str], bool] | None = None
    evaluation_sets: EvaluationSets | None = None
    drop_overlap: str = ""


def select(rows: Iterable[Row], source: Source, choice: Choice) -> Selection:
    """Reads until `limit` rows are found, or all of them. Raises UserError for columns that cannot be understood,
    two evaluation rows with one id, or no row that can be used.
    """
    chosen = Selection()
    add = _Evaluation(chosen, choice) if source.evaluation else _Training(chosen, choice, source.model_answers)
    for row in rows:
        if choice.limit is not None and choice.shuffle is None and add.count >= choice.limit:
            chosen.complete = False
            break
        chosen.read += 1
        bare = row._replace(values=NOTHING)  # what is held in memory
        if row.file not in chosen.shapes:
            shape = find_shape(row.file, row.values, choice.question_column, choice.answer_column)
            chosen.shapes[row.file] = shape
            if source.keep and source.keep[0] not in row.values:
                chosen.notes.append(f"{row.file} has no column {source.keep[0]!r}: all its rows are taken")
        if source.keep and row.values.get(source.keep[0], source.keep[1]) != source.keep[1]:
            chosen.dropped.append(Dropped(bare, f"{source.keep[0]} is not {source.keep[1]}"))
            continue
        try:
            example = read_example(chosen.shapes[row.file], row.values, source.context)
        except Fault as fault:
            chosen.dropped.append(Dropped(bare, str(fault)))
            continue
        add(Kept(bare, chosen.read - 1, example))
    add.finish()
    if choice.shuffle is not None:
        chosen.kept.sort(key=lambda kept: hashlib.sha256(f"{choice.shuffle}\n{kept.question_key}".encode()).digest())
        chosen.kept = chosen.kept[: choice.limit]
    if not chosen.kept:
        reasons = ", ".join(f"{count} {why}" for why, count in chosen.reasons().items())
        raise UserError(f"None of the {chosen.read} rows can be used ({reasons}).")
    return chosen


class _Training:
    """Adds training rows: one a question, checkable, and not in an evaluation set."""

    def __init__(self, chosen: Selection, choice: Choice, model_answers: bool):
        self.chosen, self.choice, self.model_answers = chosen, choice, model_answers
        self.first: dict[str, Kept] = {}
        self.contradicted: dict[str, Row] = {}
        self.unused: set[str] = set()

    @property
    def count(self) -> int:
        return len(self.first) - len(self.contradicted)

    def __call__(self, new: Kept) -> None:
        key, answer = new.question_key, new.example.answer
        if key in self.unused:
            self._drop(new, "a copy of a dropped question")
        elif first := self.first.get(key):
            if not self.model_answers and not self._same_answer(first.example.answer, answer):
                self.contradicted.setdefault(key, new.row)
            self._drop(new, "a copy of another question", f"of {first.row}")
        elif self.choice.verifies and not self.choice.verifies(answer):
            self._drop(new, "an answer that math-verify cannot parse", answer[:200])
        elif self.choice.too_long and self.choice.too_long(new.example.question):
            self._drop(new, "a prompt of too many tokens")
        else:
            match = self._match(new)
            if match and self.choice.drop_overlap in ("near", match.kind):
                self.unused.add(key)
                self.chosen.dropped.append(Dropped(new.row, "in an evaluation set", str(match), match))
            else:
                self.first[key] = replace(new, match=match)

    def _same_answer(self, one: str, other: str) -> bool:
        return normalized(one) == normalized(other) or bool(self.choice.same and self.choice.same(one, other))

    def _match(self, new: Kept) -> Match | None:
        sets, example = self.choice.evaluation_sets, new.example
        return sets.find(example.id or str(new.position), example.question, example.answer) if sets else None

    def finish(self) -> None:
        for key, first in self.first.items():
            if key in self.contradicted:
                self._drop(first, "copies with different answers", f"see {self.contradicted[key]}")
            else:
                self.chosen.kept.append(first)
        self.chosen.dropped.sort(key=lambda dropped: (dropped.row.file, dropped.row.number))

    def _drop(self, row: Kept, why: str, detail: str = "") -> None:
        self.chosen.dropped.append(Dropped(row.row, why, detail))


class _Evaluation:
    """Adds evaluation rows: all of them, with notes about the questionable ones."""

    def __init__(self, chosen: Selection, choice: Choice):
        self.chosen, self.choice = chosen, choice
        self.ids: dict[str, Row] = {}

    @property
    def count(self) -> int:
        return len(self.chosen.kept)

    def __call__(self, new: Kept) -> None:
        identity = new.example.id
        if identity is not None and self.ids.setdefault(identity, new.row) is not new.row:
            raise UserError(
                f"The id {identity!r} occurs twice, in {self.ids[identity]} and {new.row}; an evaluation set has "
                "one row a problem, so remove one or give them different ids."
            )
        self.chosen.kept.append(new)
        if self.choice.verifies and not self.choice.verifies(new.example.answer):
            answer = new.example.answer[:80]
            self.chosen.notes.append(
                f"{new.row}: math-verify cannot parse the answer {answer!r}, so only the same text is right"
            )

    def finish(self) -> None:
        questions = Counter(kept.question_key for kept in self.chosen.kept)
        if copies := sum(questions.values()) - len(questions):
            self.chosen.notes.append(f"{copies} questions are copies of others; kept, as the set has them")
        if self.chosen.dropped:
            self.chosen.notes.append(
                f"{len(self.chosen.dropped)} rows of an evaluation set cannot be used: scores are of the rest"
            )

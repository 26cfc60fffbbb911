"""Which training questions are in an evaluation set: the same text, or most of its n-grams.

Texts are compared as sequences of words, numbers and operators, without case, punctuation and LaTeX's delimiters,
braces and spacing. A near match shares at least `NEAR` of the evaluation question's distinct n-grams of `NGRAM` tokens:
other wordings of the beginning or end still match, and so may the same problem with another number, which
`same_answer` helps to tell apart.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from verl_trb.data.files import data_files, read_files
from verl_trb.data.shapes import Fault, Shape, find_shape, read_example
from verl_trb.errors import UserError

NGRAM = 8  # tokens
NEAR = 0.5  # share of the evaluation question's n-grams

_FORMATTING = re.compile(
    r"\\(?:left|right|displaystyle|text|textbf|mathrm|mathbf|mathit|operatorname|quad|qquad|[lc]?dots)\b"
    r"|\\[][(),;:! ]"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\[dt]frac")
# Words (ideographs one by one), numbers, and every sign that is not punctuation of text, Markdown or LaTeX.
_TOKEN = re.compile(
    r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+|(?<=\d)[.:](?=\d)|(?<!\*)\*(?!\*)|[^\w\s.,;:?\"'`$\\{}*&~_]"
)


@dataclass(frozen=True)
class Match:
    """A training question found in an evaluation set. kind: "exact" or "near"; share: of the n-grams."""

    id: str
    evaluation: str
    evaluation_id: str
    kind: str
    share: float
    same_answer: bool

    def __str__(self) -> str:
        return f"{self.kind} match of {self.evaluation} {self.evaluation_id}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def tokens(text: str) -> list[str]:
    """What is compared of a text."""
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text))
    return _TOKEN.findall(_FORMATTING.sub(" ", _FRACTION.sub(r"\\frac", text)).lower())


@lru_cache(maxsize=2**16)  # some sets have a hundred copies of each question
def normalized(text: str) -> str:
    """Equal for texts that are the same question."""
    return " ".join(tokens(text))


def ngrams(words: list[str]) -> set[str]:
    """Distinct runs of NGRAM tokens; none in a shorter text, which only matches exactly."""
    return {" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


@dataclass(frozen=True)
class _Held:
    file: str
    id: str
    answer: str
    ngrams: int


class EvaluationSets:
    """The questions of evaluation files, indexed to look training questions up."""

    def __init__(self) -> None:
        self.held: list[_Held] = []
        self.names: list[str] = []
        self._exact: dict[str, list[int]] = {}
        self._ngrams: dict[str, list[int]] = {}

    def add_file(self, path: Path) -> None:
        """All questions of a file or folder of any shape. Raises UserError if it has none."""
        shapes: dict[str, Shape] = {}
        before = len(self.held)
        for row in read_files(path, data_files(path, "test")):
            shape = shapes.setdefault(row.file, find_shape(str(path), row.values))
            try:
                example = read_example(shape, row.values)
            except Fault:
                continue
            self.add(path.name, example.id or str(row.number), example.question, example.answer)
        if len(self.held) == before:
            raise UserError(f"No question of {path} can be read, so there is nothing to compare with.")

    def add(self, file: str, id: str, question: str, answer: str) -> None:
        """One question."""
        words = tokens(question)
        grams = ngrams(words)
        number = len(self.held)
        self.held.append(_Held(file, id, answer, len(grams)))
        if file not in self.names:
            self.names.append(file)
        self._exact.setdefault(" ".join(words), []).append(number)
        for gram in grams:
            self._ngrams.setdefault(gram, []).append(number)

    def find(self, id: str, question: str, answer: str) -> Match | None:
        """The closest evaluation question, if any is close enough."""
        words = tokens(question)
        if exact := self._exact.get(" ".join(words)):
            return self._match(id, answer, exact[0], "exact", 1.0)
        shared = Counter(number for gram in ngrams(words) for number in self._ngrams.get(gram, ()))
        near = [(-count / self.held[number].ngrams, number) for number, count in shared.items()]
        if not near or -min(near)[0] < NEAR:
            return None
        share, number = min(near)
        return self._match(id, answer, number, "near", -share)

    def _match(self, id: str, answer: str, number: int, kind: str, share: float) -> Match:
        held = self.held[number]
        return Match(id, held.file, held.id, kind, round(share, 3), normalized(answer) == normalized(held.answer))


def evaluation_sets(paths: Iterable[Path]) -> EvaluationSets:
    """The questions of several files. Raises UserError for one that cannot be read."""
    sets = EvaluationSets()
    for path in paths:
        sets.add_file(path.expanduser())
    return sets

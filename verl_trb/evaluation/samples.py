"""The samples of one model on one set of problems: a JSON-lines file that grows, and that a later command goes on with.

The first line holds what made the samples; samples made otherwise never mix. A line is written whole once its sample
is scored; a process that was killed leaves at most half a line at the end, which is found and cut off.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from verl_trb.errors import UserError

HEADER = "made_with"


class Sample(NamedTuple):
    """One response. number: of the problem's samples; finish: "stop" or "length"; tokens: with the one that ends it."""

    id: str
    number: int
    score: float
    tokens: int
    finish: str
    text: str


class SampleFile:
    """A context manager; `samples` by (problem id, number) are those that are there. `repaired`: what was mended."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        """Raises UserError for samples that were made otherwise, and for a line that is not a sample."""
        self.path, self.samples, self.repaired = path, {}, ""
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.repaired = f"{path} ended in half a line, of a process that was killed; it was cut off"
        self._whole = whole
        lines = content[:whole].decode("utf-8", errors="replace").split("\n")[:-1]
        if lines:
            _check_header(path, lines[0], made_with)
        for number, line in enumerate(lines[1:], start=2):
            sample = _sample(path, number, line)
            self.samples[sample.id, sample.number] = sample
        self._made_with = None if lines else made_with
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.repaired:
            os.truncate(self.path, self._whole)
        self._file = self.path.open("a", encoding="utf-8")
        if self._made_with is not None:
            self._write({HEADER: self._made_with})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def missing(self, ids: Iterable[str], n: int) -> Iterator[tuple[str, int]]:
        """(problem id, number) of the samples that n a problem need and that are not there."""
        return ((id_, number) for id_ in ids for number in range(n) if (id_, number) not in self.samples)

    def add(self, sample: Sample) -> None:
        self._write(sample._asdict())
        self.samples[sample.id, sample.number] = sample

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None, "to be used in a with statement"
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def _check_header(path: Path, line: str, made_with: dict[str, Any]) -> None:
    try:
        before = json.loads(line)[HEADER]
        before.keys()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a file of samples: its first line does not say what made them.") from None
    for key in sorted(before.keys() | made_with.keys()):
        if before.get(key) != made_with.get(key):
            raise UserError(
                f"{path} holds samples made with {key}={before.get(key)}, and this command says {made_with.get(key)}: "
                "give it another folder with --out, or remove the file."
            )


def _sample(path: Path, number: int, line: str) -> Sample:
    try:
        record = json.loads(line)
        sample = Sample(**record)
        if not all(isinstance(getattr(sample, name), kind) for name, kind in KINDS.items()):
            raise ValueError("a value of the wrong kind")
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].removeprefix("Sample.__new__() ")
        raise UserError(
            f"{path}: line {number} is not a sample ({reason}), and it is not the last: remove it, and its sample is "
            "drawn again."
        ) from None
    return sample


KINDS: dict[str, Any] = {"id": str, "number": int, "score": (int, float), "tokens": int, "finish": str, "text": str}

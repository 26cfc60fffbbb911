"""Rows of local files, one at a time: parquet, Arrow (as `datasets` saves it), JSON lines, JSON, CSV and TSV.

A file of any size is read in batches. A folder is read file by file, sorted by name.
"""

import csv
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from verl_trb.errors import UserError

BATCH = 1000
# Beside the data in folders of the hub and of `datasets`.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
SPLITS = ("train", "test", "validation", "dev")


class Row(NamedTuple):
    """A row and where it is: the file's name below the path that was given, and its number there, from 0."""

    file: str
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}: row {self.number}"


def data_files(path: Path, split: str) -> list[Path]:
    """The data files at a path: itself, or those below a folder; only the split's where their names tell splits.

    Raises UserError if there are none.
    """
    if path.is_file():
        if path.name.removesuffix(".gz").endswith(tuple(READERS)):
            return [path]
        raise UserError(f"{path} is none of {', '.join(READERS)}.")
    if not path.is_dir():
        raise UserError(f"There is no file or folder {path}.")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.name.removesuffix(".gz").endswith(tuple(READERS))
        and file.name not in NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"The folder {path} has no data file ({', '.join(READERS)}).")
    splits = {file: _splits_named(file.relative_to(path)) for file in files}
    if any(splits.values()):
        files = [file for file in files if split in splits[file]]
        if not files:
            have = ", ".join(sorted(set.union(*splits.values())))
            raise UserError(f"The folder {path} has files of the splits {have}, and none of {split!r}; name a file.")
    return files


def read_files(path: Path, files: list[Path]) -> Iterator[Row]:
    """All rows of the files, which are those of `path`. Raises UserError for a file that is damaged or empty."""
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        reader = next(read for suffix, read in READERS.items() if file.name.removesuffix(".gz").endswith(suffix))
        number = -1
        try:
            for number, values in enumerate(reader(file)):
                yield Row(name, number, values)
        except UserError:
            raise
        except (OSError, EOFError, ValueError, csv.Error) as error:  # pyarrow's errors are among them
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"{file} is damaged: after {number + 1} rows, {reason}.") from None
        if number < 0:
            raise UserError(f"{file} has no rows.")


def _splits_named(path: Path) -> set[str]:
    return set(SPLITS) & set(re.split(r"[^a-z]+", path.as_posix().lower()))


def _open(file: Path) -> IO[str]:
    opened: IO[str]
    if file.suffix == ".gz":
        opened = gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    else:
        opened = open(file, encoding="utf-8-sig", newline="")
    return opened


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()


def _read_arrow(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)  # as `datasets` writes it
        except pyarrow.ArrowInvalid:
            whole = pyarrow.ipc.open_file(source)
            reader = (whole.get_batch(index) for index in range(whole.num_record_batches))
        for batch in reader:
            for start in range(0, len(batch), BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(file, f"line {number}", line)


def _json_object(file: Path, where: str, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {where} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise UserError(f"{file}: {where} is not a JSON object.")
    return row


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """One list of objects, one object, or lines after all."""
    with _open(file) as opened:
        text = opened.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise UserError(f"{file} is not JSON ({error}).") from None
        yield from _read_json_lines(file)
        return
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(row, dict):
            raise UserError(f"{file}: item {number} is not a JSON object.")
        yield row


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with _open(file) as opened:
        yield from csv.DictReader(opened, delimiter="\t" if ".tsv" in file.suffixes else ",", strict=True)


READERS = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}

"""What is written of a data set: verl's parquet file, the rows left out, the overlap, and a manifest of it all.

    NAME.parquet          one row a prompt, in verl's format
    NAME.manifest.json    source, revision, counts, what was left out and why, hashes
    NAME.dropped.jsonl    each row left out: file, row (from 0), why
    NAME.overlap.jsonl    each training question that is in an evaluation set, where that was checked

The same input and versions give the same bytes.
"""

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_trb.data.select import Kept, Selection
from verl_trb.data_files import check_rows, read_rows
from verl_trb.tasks.prepare import write_parquet

VERL_COLUMNS = OmegaConf.create({"prompt_key": "prompt", "reward_fn_key": "data_source"})
PACKAGES = ("verl_trb", "pyarrow", "datasets", "math-verify")


def messages(question: str, system: str) -> list[dict[str, str]]:
    """The chat that asks a question; an empty system prompt is left out."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def prompt_tokens(tokenizer: Any, question: str, system: str) -> int:
    """Length of the prompt that a run will make of a question."""
    text = tokenizer.apply_chat_template(messages(question, system), add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def verl_row(name: str, split: str, index: int, kept: Kept, system: str) -> dict[str, Any]:
    """One row in verl's format: a chat prompt, and the answer for the reward function."""
    return {
        "data_source": name,
        "prompt": messages(kept.example.question, system),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": kept.example.answer},
        "extra_info": {
            "index": index,
            "id": kept.example.id or f"{name}-{kept.position}",
            "split": split,
            "source_file": kept.row.file,
            "source_row": kept.row.number,
        },
    }


def write(folder: Path, name: str, rows: list[dict[str, Any]], facts: dict[str, Any], chosen: Selection) -> Path:
    """Writes the files and returns the parquet file's path. `facts` go into the manifest first.

    The parquet file is checked as a run checks it. Each file appears whole or not at all, the manifest last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.parquet"
    partial = file.with_name(f".{file.name}.partial")
    try:
        write_parquet(partial, rows)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    check_rows(file, read_rows(file), VERL_COLUMNS)
    dropped = [
        {"file": row.row.file, "row": row.row.number, "why": row.why} | ({"detail": row.detail} if row.detail else {})
        for row in chosen.dropped
    ]
    manifest = {
        "name": name,
        **facts,
        "columns": {where: str(shape) for where, shape in chosen.shapes.items()},
        "rows_read": chosen.read,
        "whole_source_read": chosen.complete,
        "rows": len(rows),
        "dropped": chosen.reasons(),
        "dropped_rows": _write_lines(folder / f"{name}.dropped.jsonl", dropped),
        "overlap": overlap_counts(chosen),
        "overlap_rows": _write_lines(folder / f"{name}.overlap.jsonl", [match.record() for match in chosen.matches]),
        "notes": chosen.notes,
        "output": {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    _write_text(folder / f"{name}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return file


def overlap_counts(chosen: Selection) -> dict[str, dict[str, int]]:
    """Matches by evaluation file and kind."""
    counts = Counter((match.evaluation, match.kind) for match in chosen.matches)
    return {
        file: {kind: counts[file, kind] for kind in ("exact", "near")} for file in dict.fromkeys(f for f, _ in counts)
    }


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_lines(file: Path, records: Iterable[dict[str, Any]]) -> str | None:
    """The file's name; an older one goes when there is nothing to write."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not lines:
        file.unlink(missing_ok=True)
        return None
    _write_text(file, lines)
    return file.name


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)

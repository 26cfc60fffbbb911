"""Keeps secrets out of what a run writes: its configuration, its logs, and what it sends to a tracker.

A secret is a value under a name like WANDB_API_KEY or HF_TOKEN, in this process's environment or in a configuration, or
the password in a URL.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"
NAME = re.compile(r"(^|[_.-])(token|secret|passw(or)?d|(api|access|secret)[_-]?key|credentials?)$", re.IGNORECASE)
URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+(?=@)")
LEAST = 8  # characters: shorter values would be found in innocent text


def secrets(*mappings: Mapping[str, Any]) -> set[str]:
    """The values under secret names in the environment and in `mappings` (nested ones too)."""
    return {value for mapping in (os.environ, *mappings) for value in _secret_values(mapping)}


def redacted(tree: Any, known: Iterable[str] = ()) -> Any:
    """A copy of a configuration's plain dicts and lists in which no secret is left."""
    if isinstance(tree, Mapping):
        return {
            name: HIDDEN if NAME.search(str(name)) and isinstance(value, str) and value else redacted(value, known)
            for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value, known) for value in tree]
    return redacted_text(tree, known) if isinstance(tree, str) else tree


def redacted_text(text: str, known: Iterable[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    return URL_PASSWORD.sub(rf"\1{HIDDEN}", text)


def redact_file(file: Path, known: Iterable[str]) -> None:
    """Replaces the known secrets in a log. A file without one is not written."""
    data = clean = file.read_bytes()
    for secret in known:
        clean = clean.replace(secret.encode(), HIDDEN.encode())
    if clean != data:
        file.write_bytes(clean)


def _secret_values(tree: Any) -> Iterable[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if isinstance(value, str):
                if NAME.search(str(name)) and len(value) >= LEAST:
                    yield value
            else:
                yield from _secret_values(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _secret_values(value)

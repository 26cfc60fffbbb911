"""Checks a run's data files row by row, before anything is started: columns, prompts, and their length in
tokens.

Files are what verl reads: parquet, or JSON lines; one row a prompt. Rows are counted from 0, as in the file.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from verl_trb.errors import UserError

BATCH = 1000  # prompts tokenized at one time


def files_of(value: Any) -> list[Path]:
    """The paths of data.train_files or data.val_files, which may be one path or a list."""
    values = value if isinstance(value, (list, tuple, ListConfig)) else [value]
    return [Path(str(item)).expanduser() for item in values if item]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a file. Raises UserError if it is missing, not of a known format, damaged or empty."""
    if not file.is_file():
        raise UserError(f"There is no data file {file}.")
    try:
        match file.suffix:
            case ".parquet":
                import pyarrow.parquet

                rows = pyarrow.parquet.read_table(file).to_pylist()
            case ".json" | ".jsonl":
                rows = _read_json_lines(file)
            case _:
                raise UserError(f"The data file {file} is neither .parquet nor .jsonl, which is what verl reads.")
    except OSError as error:
        raise UserError(f"The data file {file} cannot be read ({_first_line(error)}).") from None
    except UserError:
        raise
    except ValueError as error:  # pyarrow's errors among them
        raise UserError(f"The data file {file} is damaged ({_first_line(error)}).") from None
    if not rows:
        raise UserError(f"The data file {file} has no rows.")
    return rows


def check_rows(file: Path, rows: Sequence[dict[str, Any]], data: DictConfig) -> None:
    """Raises UserError naming file, row and column for a column that is missing or a value that cannot be.

    data: verl's section `data`, which names the columns.
    """
    columns = [data.prompt_key, data.reward_fn_key, "reward_model"]
    for column in columns:
        if column not in rows[0]:
            have = ", ".join(rows[0]) or "none"
            raise UserError(
                f"{file}: row 0 has no column {column!r}; it has {have}, and verl's format has {', '.join(columns)} "
                "(python -m verl_trb.prepare_data makes it)."
            )
    for number, row in enumerate(rows):
        for column, check in zip(columns, (_prompt_fault, _source_fault, _answer_fault), strict=True):
            if fault := check(row.get(column)):
                raise UserError(f"{file}: row {number}, column {column!r}: {fault}.")


def check_responses(file: Path, rows: Sequence[dict[str, Any]], column: str) -> None:
    """Raises UserError naming the first row without a text in the column of the data's own responses."""
    for number, row in enumerate(rows):
        try:
            text = response_text(row, column)
        except (KeyError, TypeError):
            text = ""
        if not text:
            raise UserError(
                f"{file}: row {number} has no response in {column!r}; name the column with trb.data_response, or set "
                "trb.data_share=0."
            )


def response_text(row: Mapping[str, Any], column: str) -> str:
    """The response in a row of the data, "" for null; `column` may be dotted, "reward_model.ground_truth". Raises
    KeyError or TypeError if it is absent.
    """
    value: Any = row
    for name in column.split("."):
        value = value[name]
    return "" if value is None else str(value)


def check_special_tokens(file: Path, rows: Sequence[dict[str, Any]], data: DictConfig, tokenizer: Any) -> None:
    """Raises UserError naming the first row whose messages contain the text of a special token.

    The chat template puts messages and special tokens into one text, which is then tokenized: such a message could end
    its turn, or forge one of the model's.
    """
    texts = {token for token in tokenizer.all_special_tokens if token.strip()}
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts |= {token.content for token in added if token.special and token.content.strip()}
    if not texts:
        return
    special = re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
    for number, row in enumerate(rows):
        for message in row[data.prompt_key]:
            if found := special.search(f"{message['role']} {message['content']}"):
                raise UserError(
                    f"{file}: row {number}, column {data.prompt_key!r}: a message contains {found[0]!r}, a special "
                    "token of the student's tokenizer, which could end the prompt or forge a turn; rewrite it."
                )


def check_lengths(file: Path, rows: Sequence[dict[str, Any]], data: DictConfig, tokenizer: Any) -> int:
    """Raises UserError naming the first row whose prompt has too many or too few tokens. Returns the rows to
    be used.

    Prompts are measured as verl makes them, with the tokenizer's chat template. With
    data.filter_overlong_prompts=true verl leaves out the long ones, and so does the count returned.
    """
    options = {
        **(data.get("apply_chat_template_kwargs") or {}),
        "add_generation_prompt": True,
        "tokenize": False,
    }
    lengths: list[int] = []
    for start in range(0, len(rows), BATCH):
        prompts = [row[data.prompt_key] for row in rows[start : start + BATCH]]
        try:
            texts = [tokenizer.apply_chat_template(prompt, **options) for prompt in prompts]
        except Exception as error:  # whatever the template raises
            reason = _first_line(error)
            raise UserError(f"{file}: the student's chat template cannot make a prompt of a row ({reason}).") from None
        lengths += [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    short = next((number for number, length in enumerate(lengths) if length < 2), None)
    if short is not None:
        raise UserError(f"{file}: row {short} has a prompt of {lengths[short]} token; the rollout engine needs two.")
    limit = data.max_prompt_length
    long = [number for number, length in enumerate(lengths) if length > limit]
    if long and not data.filter_overlong_prompts:
        also = f" ({len(long)} rows are too long)" if len(long) > 1 else ""
        raise UserError(
            f"{file}: row {long[0]} has a prompt of {lengths[long[0]]} tokens, more than "
            f"data.max_prompt_length={limit}{also}; raise it, or set data.filter_overlong_prompts=true to "
            "leave such rows out."
        )
    return len(rows) - len(long)


def _prompt_fault(prompt: Any) -> str:
    if prompt is None:
        return "there is no prompt"
    if not isinstance(prompt, list):
        return "a prompt must be a list of messages with role and content"
    for message in prompt:
        if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
            return "each message of a prompt needs a role and a content"
    if not any(str(message["content"]).strip() for message in prompt):
        return "the prompt is empty"
    return ""


def _source_fault(source: Any) -> str:
    return "" if isinstance(source, str) and source else "it must name the data source, which chooses the reward"


def _answer_fault(reward_model: Any) -> str:
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        return ""
    return "there is no ground_truth"


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    text = file.read_text(encoding="utf-8").rstrip("\n")
    for number, line in enumerate(text.split("\n") if text else []):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: row {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number} is not a JSON object.")
        rows.append(row)
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

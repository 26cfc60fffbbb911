"""What verl_trb.yaml asks of a row in verl's format; the system prompt comes with --system_instruction."""

from typing import Any

from verl_trb.rewards.math import compute_score


def question(row: dict[str, Any]) -> str:
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def answer(row: dict[str, Any]) -> str:
    return row["reward_model"]["ground_truth"]


def score(row: dict[str, Any], responses: list[str]) -> dict[str, float]:
    return {"accuracy": compute_score(row["data_source"], responses[0], answer(row), row["extra_info"])}

"""What verl_trb.yaml asks of a row in verl's format; the system prompt comes with --system_instruction."""

from typing import Any

from verl_trb.evaluation.problems import MATH, load_reward, source_reward


def question(row: dict[str, Any]) -> str:
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def answer(row: dict[str, Any]) -> str:
    return row["reward_model"]["ground_truth"]


def score(row: dict[str, Any], responses: list[str]) -> dict[str, float]:
    reward = load_reward(source_reward(row["data_source"]) or MATH)
    return {"accuracy": reward(row["data_source"], responses[0], answer(row), row.get("extra_info"))}

"""GKD's mixture: which rollouts are the data's, and what their response is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_trb.config import trb_config
from verl_trb.data_files import check_responses, response_text
from verl_trb.errors import ConfigError, UserError
from verl_trb.training.data_response import _Recorded, takes_data


def trb(**values: Any) -> Any:
    return trb_config(OmegaConf.create({"trb": values}))


def draws(settings: Any, step: int, count: int = 4000) -> list[bool]:
    return [takes_data(settings, step, sample, session) for sample in range(count // 4) for session in range(4)]


def test_share_is_a_schedule():
    settings = trb(data_share=[[1, 1.0], [5, 0.0]])
    assert all(draws(settings, 1)) and not any(draws(settings, 5)) and not any(draws(trb(), 1))
    # 4,000 draws of probability 1/2: 5 standard errors are 0.04, exceeded with alpha < 1e-6; the seed is fixed.
    assert abs(sum(draws(settings, 3)) / 4000 - 0.5) < 0.04
    assert takes_data(OmegaConf.create({"data_share": [[1, 1], [2, 0]], "seed": 0}), 1, 0, 0)  # as workers hold it


def test_draws_are_functions_of_step_and_seed():
    half = trb(data_share=0.5)
    assert draws(half, 2) == draws(half, 2) != draws(half, 3)
    assert draws(trb(data_share=0.5, seed=1), 2) != draws(half, 2)


def test_response_is_a_column():
    row = {"response": "a b", "reward_model": {"ground_truth": 7}}
    assert response_text(row, "response") == "a b" and response_text(row, "reward_model.ground_truth") == "7"
    assert response_text({"response": None}, "response") == ""
    check_responses(Path("x.parquet"), [row], "response")
    for wrong in ("answer", "response.text", "reward_model.text"):
        with pytest.raises(UserError, match=f"x.parquet: row 0 has no response in '{wrong}'"):
            check_responses(Path("x.parquet"), [row], wrong)


def test_recorded_tokens_have_probability_one():
    output = asyncio.run(_Recorded([3, 4], step=6).generate(prompt_ids=[1]))
    assert (output.token_ids, output.log_probs) == ([3, 4], [0.0, 0.0])
    assert output.extra_fields == {"min_global_steps": 5, "max_global_steps": 5}


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_wrong_share(share: Any):
    with pytest.raises(ConfigError, match="trb.data_share must be a number between 0 and 1"):
        trb(data_share=share)

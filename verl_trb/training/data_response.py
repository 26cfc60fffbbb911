"""GKD's mixture (arXiv 2306.13649): a share of the prefixes comes from the data's own responses.

An agent loop like verl's single-turn one, whose engine is the data set: the response is read, not generated.
"""

import random
from typing import Any

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.replica import TokenOutput

from verl_trb.data_files import response_text
from verl_trb.parameters import value_at

NAME = "trb_data_response"


def takes_data(trb: Any, step: int, sample: int, session: int) -> bool:
    """Whether this rollout of a training step is the data's response: a draw with probability trb.data_share.

    A pure function of its arguments and trb.seed, so that a resumed run draws the same.
    """
    share = trb.data_share if isinstance(trb.data_share, (int, float)) else [list(point) for point in trb.data_share]
    return random.Random(f"{trb.seed}/{step}/{sample}/{session}").random() < value_at(share, step)


class _Recorded:
    """Answers like verl's rollout client, with tokens that are there already, drawn with probability 1."""

    def __init__(self, token_ids: list[int], step: int) -> None:
        # As if sampled from the step's student, whose weights are those after the step before.
        versions = {"min_global_steps": step - 1, "max_global_steps": step - 1}
        self.output = TokenOutput(
            token_ids=token_ids, log_probs=[0.0] * len(token_ids), stop_reason="completed", extra_fields=versions
        )

    async def generate(self, *args: Any, **kwargs: Any) -> TokenOutput:
        return self.output


@register(NAME)
class DataResponseLoop(SingleTurnAgentLoop):
    """The prompt's response from the column that `sampling_params` names, ended by the tokenizer's EOS."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        asked = sampling_params["extra_args"]
        text = response_text(kwargs, asked["column"])
        token_ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        self.server_manager = _Recorded(token_ids[: self.response_length], asked["step"])
        return await super().run(sampling_params, **kwargs)

"""What one request tells the sampler, carried in vLLM's `SamplingParams.extra_args`.

After a prefill vLLM samples from the target model alone, which here would be the teacher. So the engine is
given the prompt without its last token, and that token is forced as the first "sample": from there on every
token comes from a block that the student drafted and the teacher verified.
"""

from dataclasses import dataclass
from typing import Any

ROLLOUT_NAME = "trb"  # verl's name for the engine: actor_rollout_ref.rollout.name
FORCED = "trb_forced_token"
PARAMS = "trb_params"
POLICY = "trb_policy"
TRACE = "trb_trace"
SEED = "trb_seed"
KEEP = "trb_keep"


@dataclass(frozen=True)
class BlendedRequest:
    """params: the rollout policy's parameters by name, None for the student alone. forced_token: the prompt's last
    token id. policy: its name, None for the run's own. trace: a name under which its tokens are traced (trace.py), None
    for no trace. seed: of the generators that draw its tokens, where it is alone in the engine (trb.deterministic).
    keep: a name under which what is verified of its tokens is kept, and k or HIDDEN_STATES (verified.py); None: nothing
    is.
    """

    params: dict[str, float] | None
    forced_token: int
    policy: str | None = None
    trace: str | None = None
    seed: int | None = None
    keep: tuple[str, int] | None = None

    def extra_args(self) -> dict[str, Any]:
        optional = {TRACE: self.trace, SEED: self.seed, KEEP: self.keep}
        given = {name: value for name, value in optional.items() if value is not None}
        return {PARAMS: self.params, FORCED: self.forced_token, POLICY: self.policy, **given}

    @classmethod
    def read(cls, extra_args: dict[str, Any] | None) -> "BlendedRequest | None":
        """None for a request that did not come through our server, which the sampler then ends unsampled."""
        if not extra_args or FORCED not in extra_args:
            return None
        optional = (extra_args.get(name) for name in (POLICY, TRACE, SEED, KEEP))
        return cls(extra_args.get(PARAMS), int(extra_args[FORCED]), *optional)

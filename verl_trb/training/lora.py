"""A student with low-rank adapters as the plain model it is: W + (alpha / r) B A, under the names it has without them.

Adapters are peft's: `base_model.model.NAME.base_layer.weight` beside `NAME.lora_A.default.weight` and
`NAME.lora_B.default.weight`. What the rollout engine gets, what is exported and what a checkpoint is turned into is
all made here; the adapters themselves are never changed.
"""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

PREFIX, BASE = "base_model.model.", ".base_layer."


def merged(
    state: Mapping[str, Tensor], scale: float, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged tensor of each parameter, in the order and dtype of the base model's.

    Args:
        state: a peft model's state dict; without adapters it passes through.
        scale: alpha / r.
        whole: makes a parameter of a tensor of `state` (gathers its shards); called in one order on all ranks.

    Raises:
        ValueError: for an adapter that is not of a linear layer.
    """
    adapters = {name for name in state if "lora_" in name}
    known = {f"{stem}{end}" for stem in _stems(state) for end in (".lora_A.default.weight", ".lora_B.default.weight")}
    if strange := sorted(adapters - known):
        raise ValueError(f"{strange[0]} is no adapter of a linear layer; such adapters cannot be merged here")
    for name, tensor in state.items():
        if name in adapters:
            continue
        weight = whole(tensor)
        stem = name.removesuffix(f"{BASE}weight")
        if f"{stem}.lora_A.default.weight" in adapters and stem != name:
            down_RI, up_OR = (whole(state[f"{stem}.lora_{side}.default.weight"]) for side in "AB")
            # In the adapters' precision or the weight's, whichever is higher; rounded once.
            weight = (weight + scale * (up_OR.float() @ down_RI.float())).to(weight.dtype)
        yield name.removeprefix(PREFIX).replace(BASE, "."), weight


def _stems(state: Mapping[str, Tensor]) -> set[str]:
    return {name.removesuffix(f"{BASE}weight") for name in state if name.endswith(f"{BASE}weight")}

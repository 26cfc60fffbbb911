"""The frozen teacher in the training worker: sharded like the student, forward only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, get_init_weight_context_manager
from verl.utils.model import get_hf_auto_model_class
from verl.utils.torch_dtypes import PrecisionType

from verl_trb.length_groups import length_groups
from verl_trb.training.head import HiddenStatesHead


class Teacher:
    """A Hugging Face causal language model under FSDP2 that answers with its last hidden states.

    Args:
        path: local Hugging Face folder.
        dtype: of its weights ("bf16", "fp32" …).
        attn_implementation: as of the student, so that both read one input layout.
        use_remove_padding: whether inputs come packed (1 x all tokens).
        offload: keep the shards in host memory between passes.
        engine_config, device_mesh: the student's FSDP engine's.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str,
        attn_implementation: str,
        use_remove_padding: bool,
        trust_remote_code: bool,
        offload: bool,
        engine_config: Any,
        device_mesh: Any,
    ) -> None:
        torch_dtype = PrecisionType.to_dtype(dtype)
        config = AutoConfig.from_pretrained(
            path, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
        with get_init_weight_context_manager(use_meta_tensor=not config.tie_word_embeddings, mesh=device_mesh)():
            module = get_hf_auto_model_class(hf_config=config).from_pretrained(
                path, config=config, torch_dtype=torch_dtype, trust_remote_code=trust_remote_code
            )
        apply_monkey_patch(model=module, use_remove_padding=use_remove_padding, ulysses_sp_size=1)
        module.set_output_embeddings(HiddenStatesHead.from_linear(module.get_output_embeddings()))
        module.to(torch_dtype).eval().requires_grad_(False)

        self.pass_price = pass_price(sum(parameter.numel() for parameter in module.parameters()))
        offload_policy = CPUOffloadPolicy() if offload else None
        fsdp_kwargs = {
            "mesh": device_mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch_dtype, cast_forward_inputs=True),
            "offload_policy": offload_policy,
            "reshard_after_forward": True,
        }
        full_state = module.state_dict()
        apply_fsdp2(module, fsdp_kwargs, engine_config)
        fsdp2_load_full_state_dict(module, full_state, device_mesh, offload_policy)
        self.module: Any = module

    @torch.no_grad()
    def hidden_states(self, **model_inputs: Any) -> Tensor:
        """Last hidden states [B, T, E] of the same inputs that the student gets; anything at padding."""

        def forward(**inputs: Any) -> Tensor:
            return self.module(**inputs, use_cache=False).logits

        # Sharded, a pass is a collective: every rank must make the same number.
        alone = torch.distributed.get_world_size() == 1
        return by_length(forward, self.pass_price, **model_inputs) if alone else forward(**model_inputs)

    @torch.no_grad()
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """The whole weight [V, E] and bias [V] of its output layer, gathered from the shards."""
        head = self.module.get_output_embeddings()
        return _whole(head.weight), None if head.bias is None else _whole(head.bias)


def pass_price(parameters: int) -> int:
    """What one more pass costs, in tokens: reading the weights once, and a few milliseconds of calls, which are many
    tokens of a small model.
    """
    return 32 + 800_000_000 // parameters


def by_length(forward: Callable[..., Tensor], price: int, **inputs: Any) -> Tensor:
    """The outputs [B, T, E] of `forward` for right-padded inputs [B, T], read in groups of similar length.

    price: of a pass, in tokens. The result is 0 where a group had no place. Packed inputs, and those with more
    dimensions, are read in one pass.
    """
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None or any(isinstance(value, Tensor) and value.shape != mask_BT.shape for value in inputs.values()):
        return forward(**inputs)
    lengths = mask_BT.sum(1).tolist()
    groups = length_groups(lengths, price)
    if len(groups) == 1:
        return forward(**inputs)
    output_BTE: Tensor | None = None
    for rows in groups:
        length = max(lengths[row] for row in rows)
        part = {n: value[rows, :length] if isinstance(value, Tensor) else value for n, value in inputs.items()}
        part_RLE = forward(**part)
        if output_BTE is None:
            output_BTE = part_RLE.new_zeros(*mask_BT.shape, part_RLE.shape[-1])
        output_BTE[rows, :length] = part_RLE
    assert output_BTE is not None
    return output_BTE


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

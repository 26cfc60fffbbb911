"""The teacher's pass in groups of similar length gives what one padded pass gives, in fewer token places."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl_trb.training.teacher import by_length


def test_groups_equal_one_padded_pass():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Qwen3Config(**shape, num_key_value_heads=1, vocab_size=50, attn_implementation="sdpa")
    model = Qwen3ForCausalLM(config).eval()
    lengths = torch.tensor([5, 60, 7, 33, 60, 6, 31, 8])
    mask_BT = (torch.arange(60) < lengths[:, None]).long()
    inputs = {
        "input_ids": torch.randint(50, mask_BT.shape) * mask_BT,
        "attention_mask": mask_BT,
        "position_ids": torch.arange(60) * mask_BT,
        "extra": "not a tensor",
    }
    read: list[torch.Size] = []

    def forward(extra, **tensors):
        read.append(tensors["input_ids"].shape)
        with torch.no_grad():
            return model(**tensors, use_cache=False).logits

    whole_BTE = forward(**inputs)
    read.clear()
    by_length(forward, 1000, **inputs)
    assert read == [mask_BT.shape]  # another pass would cost more than the padding
    read.clear()
    grouped_BTE = by_length(forward, 10, **inputs)
    assert read == [(2, 60), (2, 33), (4, 8)]
    real_BT = mask_BT.bool()
    torch.testing.assert_close(grouped_BTE[real_BT], whole_BTE[real_BT], rtol=1e-5, atol=1e-5)
    # Packed inputs have no mask, and are left alone.
    read.clear()
    by_length(forward, 10, input_ids=inputs["input_ids"][:1], attention_mask=None, extra=None)
    assert read == [(1, 60)]

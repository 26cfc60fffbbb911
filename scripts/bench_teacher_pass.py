"""The trainer's teacher pass over rollouts of uneven length: one padded pass against groups of similar length.

    python scripts/bench_teacher_pass.py build/bench_models     # about a minute on 2 cores

The 335M teacher of bench_models.py in bfloat16 reads 16 sequences of a 16-token prompt and a response of 1 to 256
tokens, drawn uniformly: the spread of a batch whose rollouts end by themselves. The same inputs through
`training.teacher.by_length` and through one padded pass, in turns; prints medians, the ratio, the share of places that
hold no token, and the largest difference of hidden states relative to their size. Exits with 1 if grouping is slower.
Leaves out packed inputs (use_remove_padding, the default on GPUs), which have no padding to save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_models import VOCABULARY, make_models
from transformers import AutoModelForCausalLM

from verl_trb.length_groups import length_groups
from verl_trb.training.teacher import by_length, pass_price


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder of the pair; made if it is not there")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_models(given.models).teacher, dtype=torch.bfloat16).eval()
    price = pass_price(model.num_parameters())
    lengths = 16 + torch.randint(1, given.longest + 1, (given.sequences,))
    width = int(lengths.max())
    mask_BT = (torch.arange(width) < lengths[:, None]).long()
    inputs = {
        "input_ids": torch.randint(4, VOCABULARY, mask_BT.shape) * mask_BT,
        "attention_mask": mask_BT,
        "position_ids": torch.arange(width) * mask_BT,
    }

    @torch.no_grad()
    def forward(**tensors: torch.Tensor) -> torch.Tensor:
        return model.model(**tensors, use_cache=False).last_hidden_state

    sides = {"padded": lambda: forward(**inputs), "grouped": lambda: by_length(forward, price, **inputs)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs = {name: side() for name, side in sides.items()}  # the first call is not timed
    for _ in range(given.repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    groups = length_groups(lengths.tolist(), price)
    places = sum(len(group) * int(lengths[group].max()) for group in groups)
    real, tokens = mask_BT.bool(), int(lengths.sum())
    padded, grouped = (outputs[name][real].float() for name in sides)
    difference = (padded - grouped).norm() / padded.norm()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{given.sequences} sequences, {tokens} tokens, {given.threads} threads")
    print(f"  padded   {medians['padded']:.3f} s, {1 - tokens / mask_BT.numel():.0%} of its places are padding")
    print(f"  grouped  {medians['grouped']:.3f} s, {1 - tokens / places:.0%}, in {len(groups)} passes")
    ratio = medians["grouped"] / medians["padded"]
    print(f"  {ratio:.2f} x the time; hidden states differ by {float(difference):.1e} (relative, bfloat16)")
    return int(ratio > 1)


if __name__ == "__main__":
    sys.exit(main())

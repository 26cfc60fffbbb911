"""Sequences of similar length together, so that little is computed for padding."""

from collections.abc import Sequence


def length_groups(lengths: Sequence[int], price: int) -> list[list[int]]:
    """Groups of indices into `lengths` that cost least: each group is padded to its longest, and costs `price` more.

    lengths: in tokens. price: what one more pass costs, in tokens; >= 0.
    The longest group comes first. Exact, by dynamic programming over the sorted lengths: O(n^2).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # best[i]: the least cost of the first i, and where their last group starts.
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        costs = [(best[start][0] + (end - start) * lengths[order[start]] + price, start) for start in range(end)]
        best.append(min(costs))
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]

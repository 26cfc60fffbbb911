"""The groups are a partition, and no other partition costs less."""

import itertools
import random

import pytest

from verl_trb.length_groups import length_groups


def cost(groups: list[list[int]], lengths: list[int], price: int) -> int:
    return sum(len(group) * max(lengths[i] for i in group) + price for group in groups)


def partitions(items: list[int]):
    """Every partition of a few items."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for more in partitions([item for item in rest if item not in others]):
                yield [[first, *others], *more]


@pytest.mark.parametrize("price", [0, 1, 7, 40])
def test_no_partition_costs_less(price):
    rng = random.Random(price)
    for _ in range(20):
        lengths = [rng.randrange(1, 30) for _ in range(rng.randrange(1, 7))]
        groups = length_groups(lengths, price)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        least = min(cost(other, lengths, price) for other in partitions(list(range(len(lengths)))))
        assert cost(groups, lengths, price) == least


def test_extremes():
    assert length_groups([], 10) == []
    assert length_groups([5, 5, 5], 1) == [[0, 1, 2]]
    assert length_groups([1, 9], 0) == [[1], [0]]
    assert length_groups([1, 9], 100) == [[1, 0]]

"""Seeds depend on all that they are for, and on nothing else."""

from itertools import product

from verl_trb.seeds import derive


def test_the_same_parts_give_the_same_seed_in_any_process():
    assert derive(0, 3, False, "000000003-000001", 0) == derive(0, 3, False, "000000003-000001", 0)
    assert derive(1, "a") == 1515775267073163690  # a hash that Python's own salt does not touch


def test_different_parts_give_different_seeds():
    seeds = [derive(*parts) for parts in product(range(8), range(8), (False, True), ("a", "b"), range(8))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)

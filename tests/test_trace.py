"""What the sampler traces: the kept tokens of named requests, over several blocks, and nothing of the others."""

import torch

from verl_trb.rollout.trace import COLUMNS, RandomState, Traces


def test_kept_tokens_of_named_requests_over_two_blocks() -> None:
    traces = Traces()
    kept_RG = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    for block in (0, 100):
        values_RG = torch.arange(9).reshape(3, 3) + block
        columns = {name: values_RG + 1000 * i for i, name in enumerate(COLUMNS)}
        traces.add(["a", None, "c"], kept_RG, **columns)
    taken = traces.take()
    assert set(taken) == {"a", "c"}
    for i, name in enumerate(COLUMNS):
        assert taken["a"][name] == [1000 * i + value for value in (0, 1, 100, 101)]
        assert taken["c"][name] == [1000 * i + value for value in (6, 106)]
    assert traces.take() == {}


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    state = RandomState(torch.device("cpu"))
    torch.rand(100)
    state.restore()
    assert torch.equal(torch.rand(4), expected)

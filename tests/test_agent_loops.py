"""Agent loops of the user's own, looked at before a run starts; that they then run is in tests/test_faults.py."""

import pytest
from omegaconf import OmegaConf

from verl_trb.agent_loops import check_agent_loop, check_agent_names
from verl_trb.errors import UserError


def config(path=None, default="single_turn_agent"):
    agent = {"agent_loop_config_path": path and str(path), "default_agent_loop": default}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": {"agent": agent}}})


@pytest.fixture
def loops(tmp_path, monkeypatch):
    """A file with two agent loops, whose module can be imported."""
    (tmp_path / "my_loops.py").write_text("class Silent: ...")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "loops.yaml"
    file.write_text("- {name: silent, _target_: my_loops.Silent}\n- {name: loud, _target_: my_loops.Loud}\n")
    return file


def test_verls_and_the_users_own_are_taken(loops):
    for path, default in [(None, "single_turn_agent"), (None, "tool_agent"), (loops, "silent"), (loops, "tool_agent")]:
        check_agent_loop(config(path, default))


def test_those_of_external_modules_are_taken(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "elsewhere")
    check_agent_loop(config(default="registered_there"))


@pytest.mark.parametrize(
    ("default", "said"),
    [("silnt", "did you mean silent?"), ("x", "there are silent, loud, single_turn_agent"), ("None", "no such")],
)
def test_an_unknown_one_is_refused_with_those_there_are(loops, default, said):
    with pytest.raises(UserError, match="default_agent_loop") as refused:
        check_agent_loop(config(loops, default))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: silent", "is not YAML"),
        ("name: silent\n_target_: my_loops.Silent", "has to be a list"),
        ("- {name: silent}", "has to be a list"),
        ("- silent", "has to be a list"),
        ("- {name: 3, _target_: a.B}", "has to be a list"),
        (
            "- {name: silent, _target_: nowhere_at_all.Silent}",
            "no module 'nowhere_at_all'; put its folder on PYTHONPATH",
        ),
        ("- {name: silent, _target_: Silent}", "no module ''"),
        ("- {name: silent, _target_: nowhere_at_all.inner.Silent}", "no module 'nowhere_at_all.inner'"),
    ],
)
def test_a_wrong_file_is_refused(loops, text, said):
    loops.write_text(text)
    with pytest.raises(UserError, match="agent_loop_config_path") as refused:
        check_agent_loop(config(loops, "silent"))
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"loops\.yaml: there is no such file"):
        check_agent_loop(config(tmp_path / "loops.yaml"))


def test_rows_may_name_loops_of_their_own(loops):
    check_agent_names(loops, [{"prompt": []}], config())
    check_agent_names(loops, [{"agent_name": name} for name in ("silent", "tool_agent")], config(loops))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"agent_name": "silent"}, {"agent_name": "silnt"}], "row 1, column 'agent_name': silnt: there is no such"),
        ([{"agent_name": "x"}], "there are silent, loud"),
        ([{"agent_name": "silent"}, {}], "row 1, column 'agent_name': None is not the name"),
        ([{"agent_name": ["silent"]}], "row 0, column 'agent_name': ['silent'] is not the name"),
    ],
)
def test_a_row_that_names_none_is_refused(loops, rows, said):
    with pytest.raises(UserError) as refused:
        check_agent_names(loops, rows, config(loops))
    assert said in str(refused.value)

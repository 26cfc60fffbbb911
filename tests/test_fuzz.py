"""Bad input at scale, through the program's own functions: whatever comes in, a UserError of one sentence or a result.

Slow: 185 cases as `few`, 18,500 as `many`. Also `scripts/fuzz.py`, guided by
coverage.
"""

import copy
import csv
import io
import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from verl_trb import checkpoints, composition
from verl_trb.config import trb_config, trb_keys
from verl_trb.data.files import data_files, read_files
from verl_trb.errors import UserError
from verl_trb.preflight import SETTING_CHECKS, check_training_data
from verl_trb.report import read_metrics
from verl_trb.verl_keys import check_counts, check_keys_and_kinds
from verl_trb.vocabulary import share_vocabulary

FEW = pytest.param(1, id="few", marks=pytest.mark.slow)
MANY = pytest.param(100, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
SCALES = pytest.mark.parametrize("scale", [FEW, MANY])
LONGEST = 60_000  # milliseconds a case may take, on a busy machine: nothing hangs


def cases(number: int, scale: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number * scale, deadline=LONGEST, derandomize=True, database=None, suppress_health_check=checks
    )


def one_sentence(error: Exception) -> None:
    text = str(error)
    assert text and "Traceback" not in text and len(text) < 5000, text


# ------------------------------------------------------------------ configurations

numbers = st.integers(-(2**70), 2**70) | st.integers(-2, 9) | st.floats() | st.sampled_from([0, 0.5, 1, 1e308, -0.0])
texts = st.text(max_size=12) | st.sampled_from(
    ["", "null", "trb", "student", "skd", "full", "topk", "sampled", "forward_kl", "gkd", "a.py:b", "/:x", "1e3", "nan"]
)
plain = st.none() | st.booleans() | numbers | texts
schedules = st.lists(st.tuples(numbers, numbers).map(list), max_size=4)
values = (
    plain | schedules | st.lists(plain, max_size=3) | st.dictionaries(st.sampled_from(["k", "epsilon", "x"]), plain)
)
VERL_KEYS = [
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.val_kwargs.temperature",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.top_p",
    "actor_rollout_ref.rollout.top_k",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
]


@pytest.fixture(scope="session")
def composed() -> DictConfig:
    """The quickstart's complete configuration."""
    found: list[DictConfig] = []
    composition.run(lambda config: found.append(config) or 0, ["recipe=quickstart"])
    return found[0]


@SCALES
def test_settings(composed, scale):
    """Any values for any few of our keys and of verl's that we check, together."""

    @cases(10, scale)
    @given(st.dictionaries(st.sampled_from([*trb_keys(), *VERL_KEYS]), values, min_size=1, max_size=4))
    def check(changes):
        config = copy.deepcopy(composed)
        try:
            for key, value in changes.items():
                OmegaConf.update(config, key, value, merge=False)
        except Exception:
            return  # not a value that any YAML file or command could give
        try:
            checked = trb_config(config)
            check_keys_and_kinds(config, set(), "quickstart")
            check_counts(config)
            config.trb = OmegaConf.structured(checked)
            for rule in SETTING_CHECKS:
                rule(config)
        except UserError as error:
            one_sentence(error)

    check()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands(toy, capsys):
    """Whole commands, composed and dry-run: exit code 0, 1 or 2, and no traceback."""
    from verl_trb.main import main

    words = st.sampled_from(sorted(trb_keys())) | st.sampled_from(VERL_KEYS) | st.text(string.printable, max_size=10)

    @cases(6, 10)
    @given(st.lists(st.tuples(words, st.sampled_from(["=", "", "=="]), texts | numbers.map(str)), max_size=3))
    def check(changes):
        arguments = ["".join(change) for change in changes]
        if {"-h", "--help"} & set(arguments) or any(one.startswith("-") for one in arguments):
            return
        assert main([*toy.overrides, "dry_run=true", *arguments]) in (0, 1, 2)
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err

    check()


# ------------------------------------------------------------------ data files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
contents = st.text(max_size=20) | st.sampled_from(["", "\x00", "\u2028", "\ud7ff", "<eos>", "<|im_end|>", "x" * 10_000])
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "", "x"]), "content": contents}
)
good_row = {
    "prompt": [{"role": "user", "content": "3ABCDEFGHABCD="}],
    "data_source": "table_walk",
    "reward_model": {"ground_truth": "ABC"},
}
columns = {
    "prompt": st.lists(messages, max_size=3) | json_values,
    "data_source": json_values,
    "reward_model": st.fixed_dictionaries({"ground_truth": json_values}) | json_values,
}
rows = st.lists(
    st.just(good_row) | st.fixed_dictionaries({}, optional=columns) | st.dictionaries(st.text(max_size=5), json_values),
    max_size=4,
)


def damaged(data: bytes, edits: list[tuple[int, bytes]], cut: int | None) -> bytes:
    for place, piece in edits:
        at = place % (len(data) + 1)
        data = data[:at] + piece + data[at + len(piece) // 2 :]
    return data if cut is None else data[: cut % (len(data) + 1)]


edits = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), max_size=3)
cuts = st.none() | st.integers(0, 10**6)


def refused_or_read(config: DictConfig, file: Path) -> None:
    config.data.train_files = str(file)
    try:
        check_training_data(config)
    except UserError as error:
        one_sentence(error)


@pytest.fixture
def toy_config(toy, composed) -> DictConfig:
    config = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    config.actor_rollout_ref.model.path, config.trb.teacher.path = str(toy.student), str(toy.teacher)
    config.data.train_batch_size = 1
    return config


@SCALES
def test_json_lines(toy_config, tmp_path, scale):
    """What a run reads: rows of any shape, in any encoding, damaged anywhere."""
    file = tmp_path / "train.jsonl"

    @cases(25, scale)
    @given(rows, st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-8-sig"]), edits, cuts)
    def check(content, encoding, changes, cut):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        file.write_bytes(damaged(text.encode(encoding, "replace"), changes, cut))
        refused_or_read(toy_config, file)

    check()


@SCALES
def test_parquet(toy, toy_config, tmp_path, scale):
    """The toy's own file damaged anywhere, and sound files of rows of any shape."""
    import pyarrow
    import pyarrow.parquet

    whole, file = toy.train_file.read_bytes(), tmp_path / "fuzz.parquet"

    @cases(20, scale)
    @given(rows, st.booleans(), edits, cuts)
    def check(content, sound, changes, cut):
        if sound:
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
            except (pyarrow.ArrowException, UnicodeError, OverflowError):
                return  # rows that no parquet file can hold
        else:
            file.write_bytes(damaged(whole, changes, cut))
        refused_or_read(toy_config, file)

    check()


@SCALES
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".csv.gz"])
def test_what_prepare_data_reads(tmp_path, suffix, scale):
    path = tmp_path / f"rows{suffix}"
    cells = st.text(max_size=15) | st.sampled_from(['"', ",", "\x00", "\r\n", '"",', "a" * 200_000])

    @cases(10, scale)
    @given(st.lists(st.lists(cells, max_size=4), max_size=5), edits, cuts)
    def check(table, changes, cut):
        if ".csv" in suffix or ".tsv" in suffix:
            buffer = io.StringIO()
            try:
                csv.writer(buffer, escapechar="\\").writerows(table)
            except csv.Error:
                return
            text = buffer.getvalue()
        else:
            text = "\n".join(json.dumps({str(n): cell for n, cell in enumerate(row)}) for row in table)
        path.write_bytes(damaged(text.encode("utf-8", "surrogatepass"), changes, cut))
        try:
            assert all(isinstance(row.values, dict) for row in read_files(path, data_files(path, "train")))
        except UserError as error:
            one_sentence(error)

    check()


# ------------------------------------------------------------------ tokenizer pairs, checkpoints, metrics


@SCALES
def test_tokenizer_pairs(scale):
    ids = st.dictionaries(st.text(max_size=4), st.integers(0, 12), max_size=8)
    small = st.integers(-1, 14)

    @cases(40, scale)
    @given(ids, st.none() | ids, small, small, small, small, st.lists(small, max_size=3))
    def check(student, teacher, student_eos, teacher_eos, student_rows, teacher_rows, spare):
        try:
            shared = share_vocabulary(
                student,
                student if teacher is None else teacher,
                student_eos=student_eos,
                teacher_eos=teacher_eos,
                student_rows=student_rows,
                teacher_rows=teacher_rows,
                spare_ids=spare,
            )
        except ValueError as error:
            return one_sentence(error)
        assert 0 <= shared.student_eos < shared.size <= min(student_rows, teacher_rows)
        assert shared.student_eos not in shared.masked and shared.marker in shared.masked
        assert all(0 <= token < shared.size for token in shared.masked)

    check()


@SCALES
def test_checkpoints(tmp_path, scale):
    """Any manifest and any files: found or not, never an error, and never one whose files differ from its list."""

    @cases(20, scale)
    @given(json_values | st.dictionaries(st.just("files"), json_values), edits, cuts, st.integers(0, 30))
    def check(manifest, changes, cut, length):
        folder = tmp_path / f"global_step_{7}"
        folder.mkdir(exist_ok=True)
        (folder / "data.json").write_bytes(b"x" * length)
        text = json.dumps(manifest) if changes else json.dumps({"files": {"data.json": 15}})
        (folder / checkpoints.MANIFEST).write_bytes(damaged(text.encode(), changes, cut))
        found = checkpoints.find(tmp_path)
        assert found.step in (0, 7) and (found.step == 7) == (not found.unusable)
        if not changes and cut is None:
            assert (found.step == 7) == (length == 15)

    check()


@SCALES
def test_metrics(tmp_path, scale):
    """metrics.jsonl with anything in it: a report of what is whole, or a ValueError of one sentence."""
    line = json.dumps({"step": 3, "trb/epsilon": 0.1})

    @cases(20, scale)
    @given(st.lists(json_values.map(json.dumps) | st.just(line), max_size=5), edits, cuts)
    def check(lines, changes, cut):
        (tmp_path / "metrics.jsonl").write_bytes(damaged("\n".join(lines).encode(), changes, cut))
        try:
            read_metrics(tmp_path)
        except ValueError as error:
            one_sentence(error)

    check()


def test_nothing_is_left_behind(tmp_path):
    """No partial output: a refused command makes no run folder."""
    from verl_trb.main import main

    before = os.listdir(tmp_path)
    assert main(["recipe=quickstart", f"trb.run_dir={tmp_path}/run", "trb.epsilon=-1"]) == 2
    assert os.listdir(tmp_path) == before

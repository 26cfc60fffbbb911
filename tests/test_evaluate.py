"""What is evaluated on what, and the file of samples: everything but the engine (test_evaluate_engine.py has that)."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ToyRun

from verl_trb.checkpoints import MANIFEST
from verl_trb.errors import UserError
from verl_trb.evaluate import main
from verl_trb.evaluation.estimators import Interval
from verl_trb.evaluation.models import Candidate, candidates, whole_state
from verl_trb.evaluation.problems import find_file, load_reward, read_sets, reward_name, scorer
from verl_trb.evaluation.results import draw, markdown, means, score, table
from verl_trb.evaluation.samples import Sample, SampleFile
from verl_trb.evaluation.sampling import end_ids, load_tokenizer, prompt_ids, sample_seed
from verl_trb.tasks.prepare import write_parquet

MADE_WITH = {"model": "m", "seed": 0}


def row(number: int, **changes: Any) -> dict[str, Any]:
    whole = {
        "data_source": "amc23",
        "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "id": f"p{number}"},
    }
    return whole | changes


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs the command, which must refuse before any engine starts. Returns its sentence."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("error: "), said
        return said[0].removeprefix("error: ")

    return run


# ------------------------------------------------------------------------------------------ problems


def test_sets_are_the_sources_of_the_files(tmp_path: Path) -> None:
    rows = [row(0), row(1, data_source="aime24"), row(2)]
    file = write_rows(tmp_path / "mixed.jsonl", rows)
    sets = read_sets([file])
    assert [(one.name, [problem.id for problem in one.problems]) for one in sets] == [
        ("amc23", ["p0", "p2"]),
        ("aime24", ["p1"]),
    ]
    (limited,) = read_sets([write_rows(tmp_path / "amc.jsonl", [row(0), row(2)])], limit=1)
    assert [problem.id for problem in limited.problems] == ["p0"] and limited.digest == sets[0].digest
    (changed,) = read_sets([write_rows(tmp_path / "other.jsonl", [row(0), row(3)])])
    assert changed.digest != limited.digest


def test_two_rows_with_one_id_are_refused(tmp_path: Path, refused: Callable[..., str], toy: ToyRun) -> None:
    rows = [row(0), row(1), row(2, extra_info={"id": "p0"})]
    file = write_rows(tmp_path / "twice.jsonl", rows)
    said = refused(str(toy.student), "--data", str(file))
    assert said.startswith(
        f"{file}: rows 0 and 2 of the set 'amc23' have the same id 'p0'; an evaluation set has one row"
    )


def test_a_set_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / name, [row(0)]) for name in ("one.jsonl", "two.jsonl")]
    with pytest.raises(UserError, match="The set 'amc23' is in .*one.jsonl and in .*two.jsonl; give one"):
        read_sets(files)


def test_wrong_columns(tmp_path: Path, refused: Callable[..., str], toy: ToyRun) -> None:
    file = write_rows(tmp_path / "raw.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    assert refused(str(toy.student), "--data", str(file)) == (
        f"{file}: row 0 has no column 'prompt'; it has problem, answer, and verl's format has prompt, data_source, "
        "reward_model (python -m verl_trb.prepare_data makes it)."
    )


def test_files_by_the_name_of_their_set(tmp_path: Path, refused: Callable[..., str], toy: ToyRun) -> None:
    assert refused(str(toy.student), "--data", "amc32") == (
        "There is no data set 'amc32'; did you mean amc23 or aime25 or aime24?"
    )
    assert refused(str(toy.student), "--data", "amc23") == (
        f"There is no data file {tmp_path}/amc23.parquet; make it with `python -m verl_trb.prepare_data amc23`."
    )
    write_parquet(tmp_path / "amc23.parquet", [row(0)])
    assert find_file("amc23", tmp_path) == tmp_path / "amc23.parquet"
    said = refused(str(toy.student), "--data", str(tmp_path / "gone.parquet"))
    assert said == f"There is no data file {tmp_path}/gone.parquet."


def test_rewards_are_those_of_the_source(tmp_path: Path) -> None:
    (one,) = read_sets([write_rows(tmp_path / "amc.jsonl", [row(5)])])
    reward = load_reward(reward_name(one, None))
    judge = scorer(reward, one.problems[0])
    assert [judge(text) for text in (r"so \boxed{6}", "Answer: 6.0", "7")] == [1.0, 1.0, 0.0]
    assert reward_name(replace(one, name="table_walk_selection"), None).startswith("verl_trb.tasks.table_walk:")
    assert load_reward(reward_name(replace(one, name="guess_work_check_recovery"), None)).__module__.endswith("_check")
    assert reward_name(replace(one, name="reasoning_gym/chain_sum"), None).startswith("verl_trb.rewards.math:")
    with pytest.raises(
        UserError, match="no reward function is known for the data_source 'mine'; name one with --reward"
    ):
        reward_name(replace(one, name="mine"), None)


def test_the_harness_s_task_scores_by_the_source() -> None:
    task = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "lm_eval" / "verl_trb_task.py"))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}]
    row = {"prompt": messages, "data_source": "amc23", "reward_model": {"ground_truth": "2"}, "extra_info": {}}
    assert task["question"](row) == "1 + 1?" and task["answer"](row) == "2"
    assert [task["score"](row, [f"\\boxed{{{n}}}"])["accuracy"] for n in (2, 3)] == [1.0, 0.0]
    toy = {**row, "data_source": "table_walk", "reward_model": {"ground_truth": "A5B3."}}
    assert [task["score"](toy, [text])["accuracy"] for text in ("A5B3", "\\boxed{A5B3.}")] == [1.0, 0.0]


def test_a_reward_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(data_source, solution_str, ground_truth, extra_info):\n"
                    "    return {'score': len(solution_str) < 3, 'id': extra_info['id']}\n")  # fmt: skip
    (one,) = read_sets([write_rows(tmp_path / "amc.jsonl", [row(5)])])
    judge = scorer(load_reward(reward_name(one, f"{file}:short")), one.problems[0])
    assert (judge("ab"), judge("abc")) == (1.0, 0.0)
    for name, sentence in (
        ("mine", "takes MODULE:NAME or FILE.py:NAME"),
        (f"{tmp_path}/gone.py:short", "cannot be run"),
        ("verl_trb.nowhere:short", "cannot be run"),
        (f"{file}:long", "there is no function 'long'"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_reward(name)


# ------------------------------------------------------------------------------------------ models


@pytest.fixture
def run_dir(toy: ToyRun) -> Path:
    """A run's folder as training leaves it, with checkpoints of steps 10 and 2 that hold no real weights."""
    run = toy.folder / "demo"
    for step in (10, 2):
        actor = run / "checkpoints" / f"global_step_{step}" / "actor"
        (actor / "huggingface").mkdir(parents=True)
        (actor / "huggingface" / "config.json").write_text((toy.student / "config.json").read_text())
        (actor / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
        (actor / "model_world_size_1_rank_0.pt").write_bytes(b"")
        (actor.parent / MANIFEST).write_text('{"files": {}}')
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    (run / "config.yaml").write_text(f"actor_rollout_ref: {{model: {{path: {toy.student}}}}}\n")
    (run / "student").symlink_to(toy.student)
    return run


def test_a_run_is_its_start_and_its_checkpoints(run_dir: Path, toy: ToyRun) -> None:
    found = candidates([str(run_dir)])
    assert [(c.name, c.step, c.run, c.checkpoint) for c in found] == [
        ("demo@0", 0, "demo", False),
        ("demo@2", 2, "demo", True),
        ("demo@10", 10, "demo", True),
    ]
    assert found[0].path == str(toy.student)
    for one in ("checkpoints/global_step_10", "checkpoints/global_step_10/actor"):
        assert candidates([str(run_dir / one)]) == [found[2]]
    assert candidates([str(run_dir / "checkpoints")]) == found[1:]
    assert candidates([f"mine={run_dir}"])[2].name == "mine@10"
    assert candidates([f"mine={toy.teacher}"]) == [Candidate("mine", str(toy.teacher))]
    assert candidates(["Qwen/Qwen3-8B", "base=Qwen/Qwen3-1.7B-Base"])[1].name == "base"


def test_the_student_of_a_run_is_its_last_step(run_dir: Path) -> None:
    (run_dir / "student").unlink()
    (run_dir.parent / "student").rename(run_dir / "student")
    (found,) = candidates([str(run_dir / "student")])
    assert (found.name, found.run, found.step) == ("demo/student", "demo", 10)


def test_what_is_no_model_is_one_sentence(run_dir: Path, toy: ToyRun, refused: Callable[..., str]) -> None:
    step = run_dir / "checkpoints" / "global_step_2"

    def said(path: Path | str) -> str:
        return refused(str(path), "--data", str(toy.val_file))

    assert said(toy.folder / "gone") == (
        f"There is no model folder or run {toy.folder}/gone; a model of the hub is OWNER/NAME."
    )
    assert "is the configuration of a checkpoint without its weights; give" in said(step / "actor" / "huggingface")
    (step / "critic").mkdir()
    assert said(step / "critic") == f"{step}/critic is not the model of its checkpoint; give {step}."
    (step / "actor" / "model_world_size_1_rank_0.pt").unlink()
    assert "holds no weights (model_world_size_*_rank_0.pt); copy the whole checkpoint" in said(step)
    (step / "actor" / "fsdp_config.json").unlink()
    assert "actor is a checkpoint of another kind: it has no fsdp_config.json (it has huggingface)" in said(step)
    (step / "actor" / "dist_ckpt").mkdir()
    assert "is a checkpoint of Megatron" in said(step) and "python -m verl.model_merger" in said(run_dir)
    empty = run_dir.parent / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert said(empty) == f"The run {empty} has no checkpoint."
    adapter = run_dir.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert said(adapter) == f"{adapter} holds an adapter without its model; merge it into the model first."
    (toy.teacher / "model.safetensors").write_bytes(b"half")
    assert "model.safetensors is damaged" in said(toy.teacher)


def test_two_models_of_one_name_are_refused(toy: ToyRun, refused: Callable[..., str]) -> None:
    other = toy.folder / "other" / "student"
    other.parent.mkdir()
    other.symlink_to(toy.student)
    said = refused(str(toy.student), str(other), "--data", str(toy.val_file))
    assert said.startswith("Two models are called 'student'; give one another name: NAME=")


def test_a_checkpoint_that_is_not_whole(
    run_dir: Path, toy: ToyRun, refused: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint = run_dir / "checkpoints" / "global_step_2"
    cache = "--cache-dir", str(tmp_path / "cache")
    said = refused(str(checkpoint), "--data", str(toy.val_file), *cache)
    assert said.startswith(f"The checkpoint {checkpoint}/actor cannot be read (") and said.endswith("; is it whole?")
    (checkpoint / "actor" / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    said = refused(str(checkpoint), "--data", str(toy.val_file), *cache)
    assert said == (
        f"The checkpoint {checkpoint}/actor of 2 ranks lacks model_world_size_2_rank_0.pt; copy the whole folder."
    )


SHARDS = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, ranks, folder, shape = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
names = ("ddp", "fsdp")[-len(shape):]
mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
torch.manual_seed(0)
placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
state = {name: distribute_tensor(torch.randn(size), mesh, placements) for name, size in (("a", (5, 3)), ("b", (7,)))}
state["buffer"] = torch.arange(3.0)
torch.save(state, f"{folder}/model_world_size_{ranks}_rank_{rank}.pt")
dist.barrier()
"""


@pytest.mark.parametrize("shape", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_shards_are_put_together(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Uneven shards of real ranks, and with replicas: torch's own DTensors, saved as verl saves them."""
    ranks = int(torch.tensor(shape).prod())
    arguments = [str(ranks), str(tmp_path), str(shape)]
    running = [subprocess.Popen([sys.executable, "-c", SHARDS, str(rank), *arguments]) for rank in range(ranks)]
    assert [process.wait(timeout=400) for process in running] == [0] * ranks
    (tmp_path / "fsdp_config.json").write_text(json.dumps({"world_size": ranks}))
    torch.manual_seed(0)
    expected = {"a": torch.randn(5, 3), "b": torch.randn(7), "buffer": torch.arange(3.0)}
    torch.testing.assert_close(whole_state(tmp_path), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ samples


def sample(number: int, id_: str = "p0", right: float = 1.0) -> Sample:
    return Sample(id_, number, right, 12, "stop", "a\u2028b \\boxed{1}\n")


def test_samples_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "model" / "set.jsonl"
    with SampleFile(path, MADE_WITH) as file:
        assert list(file.missing(["p0", "p1"], 2)) == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
        file.add(sample(1))
        file.add(sample(0, "p1"))
    with SampleFile(path, MADE_WITH) as file:
        assert file.samples == {("p0", 1): sample(1), ("p1", 0): sample(0, "p1")} and not file.repaired
        assert list(file.missing(["p0", "p1"], 2)) == [("p0", 0), ("p1", 1)]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_half_a_last_line_is_cut_off_and_said(tmp_path: Path, kept: int) -> None:
    """Cut anywhere: within the first line, within a sample, just before the line's end."""
    path = tmp_path / "set.jsonl"
    with SampleFile(path, MADE_WITH) as file:
        file.add(sample(0))
        file.add(sample(1))
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[kept]) // 2, len(lines[kept]) - 1):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
        with SampleFile(path, MADE_WITH) as file:
            assert file.repaired == f"{path} ended in half a line, of a process that was killed; it was cut off"
            assert len(file.samples) == max(kept - 1, 0)
            for number in range(len(file.samples), 2):
                file.add(sample(number))
        assert path.read_bytes() == b"".join(lines)


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, run_dir: Path) -> None:
    path = tmp_path / "set.jsonl"
    with SampleFile(path, MADE_WITH) as file:
        file.add(sample(0))
    for line, reason in (
        ('{"id": "p0", "nu', "Unterminated string"),
        ('{"id": "p0"}', "missing 5 required"),
        ('{"id": 7, "number": 1, "score": 1, "tokens": 3, "finish": "stop", "text": ""}', "a value of the wrong kind"),
    ):
        whole = path.read_text()
        path.write_text(whole + line + "\n" + whole.splitlines()[1] + "\n")
        with pytest.raises(UserError, match=rf"set.jsonl: line 3 is not a sample \({reason}.*remove it"):
            SampleFile(path, MADE_WITH)
        path.write_text(whole)


def test_samples_made_otherwise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    with SampleFile(path, MADE_WITH):
        pass
    with pytest.raises(
        UserError, match="holds samples made with seed=0, and this command says 1: give it another folder"
    ):
        SampleFile(path, MADE_WITH | {"seed": 1})
    path.write_text('{"id": "p0"}\n')
    with pytest.raises(UserError, match="is not a file of samples"):
        SampleFile(path, MADE_WITH)


# ------------------------------------------------------------------------------------------ prompts and seeds


def test_prompts_and_ends_are_those_of_training(toy: ToyRun, tmp_path: Path) -> None:
    """The ids that verl's agent loop makes of a row, by its own builder; the EOS that ends its rollouts."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tokenizer = load_tokenizer("student", str(toy.student))
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3", chat_template_kwargs={})
    (one, *_) = read_sets([toy.val_file])
    for problem in one.problems:
        assert prompt_ids(tokenizer, problem.messages, {}) == builder.build_initial_tokens(problem.messages)
    assert tokenizer.eos_token_id in end_ids(tokenizer, str(toy.student))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="The model bare has no chat template"):
        load_tokenizer("bare", str(tmp_path / "bare"))


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds = {sample_seed(s, name, id_, n) for s in (0, 1) for name in "ab" for id_ in ("1", "11") for n in range(100)}
    assert len(seeds) == 800 and all(0 <= seed < 1 << 62 for seed in seeds)
    assert sample_seed(0, "a", "1", 0) == sample_seed(0, "a", "1", 0)


# ------------------------------------------------------------------------------------------ results


def test_scores_by_hand() -> None:
    rights = {"p0": [1, 0, 1, 1], "p1": [0, 0, 0, 0], "p2": [0.99, 1, 0, 5]}
    samples = {
        (id_, n): Sample(id_, n, right, 10 * (n + 1), "length" if n == 3 else "stop", "")
        for id_, of_one in rights.items()
        for n, right in enumerate(of_one)
    }
    found = score(samples, list(rights), 4, [1, 2], seed=0)
    assert found.passes[1].mean == pytest.approx((0.75 + 0 + 0.5) / 3)  # right is a score of at least 1
    assert found.passes[2].mean == pytest.approx((1 + 0 + 5 / 6) / 3)
    assert (found.mean_tokens, found.truncated, found.problems, found.n) == (25, 0.25, 3, 4)


def test_table_and_picture(tmp_path: Path) -> None:
    """Written for curves of two runs beside a model without a step, and for models without any."""

    def scores(right: float) -> dict[str, Any]:
        samples = {
            (f"p{i}", n): Sample(f"p{i}", n, float(i < 10 * right), 10, "stop", "") for i in range(10) for n in (0, 1)
        }
        ids = [f"p{i}" for i in range(10)]
        return {name: score(samples, ids, 2, [1, 2], 0) for name in ("amc23", "aime24")}

    lone = Candidate("teacher", "t")
    runs = [Candidate(f"{run}@{step}", "x", True, run, step) for run in ("a", "b") for step in (0, 10)]
    results = [
        (candidate, scores(right)) for candidate, right in zip([lone, *runs], (0.9, 0.1, 0.5, 0.2, 0.4), strict=True)
    ]
    text = markdown(results, 0)
    assert "| a@10 | amc23 | 10 × 2 | 50.0 [20.0, 80.0] | 50.0 [20.0, 80.0] | -40.0 [-70.0, -10.0] | 10 | 0% |" in text
    assert "| teacher | mean |  | 90.0 [" in text
    assert means(results[2][1], 0)[1].mean == 0.5 and isinstance(means(results[2][1], 0)[1], Interval)
    assert len(table(results, 0).rows) == 5
    for name, some in (("curves.png", results), ("points.png", results[:1])):
        draw(some, 0, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

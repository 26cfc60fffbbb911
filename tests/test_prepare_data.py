"""The command: from a file to verl's parquet, a manifest and the rows left out; the same bytes for the same input."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from conftest import ToyRun
from omegaconf import OmegaConf

from verl_trb.data import SYSTEM_PROMPT
from verl_trb.data.output import VERL_COLUMNS
from verl_trb.data_files import check_rows, read_rows
from verl_trb.prepare_data import main
from verl_trb.rewards.math import compute_score

ROOT = Path(__file__).resolve().parent.parent
REAL = os.environ.get("VERL_TRB_REAL_DATA", "")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def problems(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"What is ${n}+{n}$, and why?", "answer": str(2 * n), "id": f"p{n}"} for n in range(count)]


@pytest.fixture
def prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[dict[str, Any]], dict]]:
    """Prepares rows as the named set; returns the output's rows and the manifest, which are consistent."""

    def run(name: str, rows: list[dict[str, Any]] | Path, *options: str) -> tuple[list[dict[str, Any]], dict]:
        file = rows if isinstance(rows, Path) else write(tmp_path / "in.jsonl", rows)
        assert main([name, "--from", str(file), "--out", str(tmp_path), *options]) == 0, capsys.readouterr().err
        manifest = json.loads((tmp_path / f"{name}.manifest.json").read_text())
        output = tmp_path / f"{name}.parquet"
        assert manifest["output"]["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
        made = read_rows(output)
        check_rows(output, made, VERL_COLUMNS)
        assert manifest["rows"] == len(made)
        assert [row["extra_info"]["index"] for row in made] == list(range(len(made)))
        listed = dropped(tmp_path, name)
        assert len(listed) == sum(manifest["dropped"].values())
        if manifest["whole_source_read"] and not manifest["shuffle"]:
            assert manifest["rows_read"] == manifest["rows"] + len(listed)
            places = {(row["extra_info"]["source_file"], row["extra_info"]["source_row"]) for row in made}
            places |= {(row["file"], row["row"]) for row in listed}
            assert len(places) == manifest["rows_read"]  # no row is lost
        return made, manifest

    return run


def dropped(folder: Path, name: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.dropped.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0].removeprefix("error: ")


# ------------------------------------------------------------------------------------------ what is made


def test_a_training_row(prepared: Callable):
    rows, manifest = prepared("math", problems(3))
    assert rows[1] == {
        "data_source": "math",
        "prompt": [
            {"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."},
            {"role": "user", "content": "What is $1+1$, and why?"},
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 1, "id": "p1", "split": "train", "source_file": "in.jsonl", "source_row": 1},
    }
    assert manifest["rows_read"] == 3 and manifest["dropped"] == {} and manifest["dropped_rows"] is None
    assert manifest["files"].keys() == {"in.jsonl"} and manifest["versions"]["pyarrow"]
    assert manifest["notes"] == ["3 rows were read, and DigitalLearningGmbH/MATH-lighteval is known to have 7500"]


def test_the_same_input_gives_the_same_bytes_in_another_process(tmp_path: Path, prepared: Callable):
    rows = [*problems(20), {"problem": "", "answer": "1"}]
    prepared("math", rows, "--shuffle", "5")
    first = {file.name: file.read_bytes() for file in tmp_path.glob("math.*")}
    command = [sys.executable, "scripts/prepare_data.py", "math", "--from", str(tmp_path / "in.jsonl")]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--out", str(tmp_path), "--shuffle", "5"], cwd=ROOT, env=environment, check=True)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("math.*")} == first
    assert first.keys() == {"math.parquet", "math.manifest.json", "math.dropped.jsonl"}


def test_shuffling_depends_on_the_seed_and_not_on_the_input_order(prepared: Callable):
    def questions(rows: list[dict[str, Any]], seed: str) -> list[str]:
        return [row["prompt"][1]["content"] for row in prepared("math", rows, "--shuffle", seed, "--limit", "8")[0]]

    one = questions(problems(30), "1")
    assert one == questions(problems(30)[::-1], "1")
    assert one != questions(problems(30), "2")
    assert len(one) == 8


def test_limit_takes_the_first_usable_rows(prepared: Callable):
    rows, manifest = prepared("math", [{"problem": "", "answer": "1", "id": "e"}, *problems(9)], "--limit", "4")
    assert [row["extra_info"]["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert manifest["rows_read"] == 5 and manifest["whole_source_read"] is False


def test_too_few_rows_are_said(prepared: Callable):
    _, manifest = prepared("math", problems(3), "--limit", "5")
    assert "3 rows could be used, fewer than the 5 wanted" in manifest["notes"]


def test_openthoughts3(prepared: Callable, tmp_path: Path):
    """Math only, one row a question, the first copy with an answer; the answers of copies may differ."""

    def row(question: str, answer: str | None, domain: str = "math") -> dict[str, Any]:
        response = "<think>hm</think> " + (f"So $\\boxed{{{answer}}}$." if answer else "and so on, without an end")
        chat = [{"from": "human", "value": question}, {"from": "gpt", "value": response}]
        return {"difficulty": 8, "source": "s", "domain": domain, "conversations": chat}

    rows, manifest = prepared(
        "openthoughts3",
        [
            row("Write a loop.", "1", "code"),
            row("First?", None),
            row("First?", "1"),
            row("First?", "2"),
            row("Second?", "3"),
        ],
    )
    assert [(row["prompt"][1]["content"], row["reward_model"]["ground_truth"]) for row in rows] == [
        ("First?", "1"),
        ("Second?", "3"),
    ]
    assert all(row["prompt"][0] == {"role": "system", "content": SYSTEM_PROMPT} for row in rows)
    assert manifest["limit"] == 25_600
    assert [(row["row"], row["why"]) for row in dropped(tmp_path, "openthoughts3")] == [
        (0, "domain is not math"),
        (1, "no boxed answer in its solution"),
        (3, "a copy of another question"),
    ]


def test_a_file_without_the_column_to_filter_by_is_taken_whole(prepared: Callable):
    rows, manifest = prepared("openthoughts3", problems(2))
    assert len(rows) == 2 and "in.jsonl has no column 'domain': all its rows are taken" in manifest["notes"]


def test_dropped_training_rows_are_listed_with_reasons(prepared: Callable, tmp_path: Path):
    rows, manifest = prepared(
        "dapo_math_17k",
        [
            {"problem": "What is $1+1$?", "answer": "2"},
            {"problem": "what is 1 + 1", "answer": "2"},
            {"problem": "How many?", "answer": "3"},
            {"problem": "How  many?", "answer": "4"},
            {"problem": None, "answer": "4"},
            {"problem": "Nothing?", "answer": None},
            {"problem": "Which braces?", "answer": "}{"},
            {"problem": "A half?", "answer": "0.5"},
            {"problem": "A half ?", "answer": "\\frac{1}{2}"},
        ],
    )
    assert [row["prompt"][1]["content"] for row in rows] == ["What is $1+1$?", "A half?"]
    listed = [(row["row"], row["why"], row.get("detail")) for row in dropped(tmp_path, "dapo_math_17k")]
    assert listed == [
        (1, "a copy of another question", "of in.jsonl: row 0"),
        (2, "copies with different answers", "see in.jsonl: row 3"),
        (3, "a copy of another question", "of in.jsonl: row 2"),
        (4, "no question", None),
        (5, "no answer", None),
        (6, "an answer that math-verify cannot parse", "}{"),
        (8, "a copy of another question", "of in.jsonl: row 7"),
    ]
    assert manifest["dropped"]["a copy of another question"] == 3


def test_an_older_list_of_dropped_rows_goes(prepared: Callable, tmp_path: Path):
    prepared("math", [*problems(2), {"problem": "", "answer": "1"}])
    assert dropped(tmp_path, "math")
    prepared("math", problems(2))
    assert not (tmp_path / "math.dropped.jsonl").exists()


def test_an_evaluation_set_keeps_every_row(prepared: Callable, tmp_path: Path):
    rows, manifest = prepared(
        "aime24",
        [
            {"problem": "What is $1+1$?", "answer": "2"},
            {"problem": "What is $1+1$?", "answer": "2"},
            {"problem": "Which braces?", "answer": "}{"},
            {"problem": "", "answer": "1"},
        ],
    )
    assert [row["extra_info"]["id"] for row in rows] == ["aime24-0", "aime24-1", "aime24-2"]
    assert rows[0]["extra_info"]["split"] == "test"
    assert manifest["notes"] == [
        "in.jsonl: row 2: math-verify cannot parse the answer '}{', so only the same text is right",
        "1 questions are copies of others; kept, as the set has them",
        "1 rows of an evaluation set cannot be used: scores are of the rest",
        "4 rows were read, and math-ai/aime24 is known to have 30",
    ]
    assert [row["why"] for row in dropped(tmp_path, "aime24")] == ["no question"]


def test_system_prompt_of_ones_own_or_none(prepared: Callable):
    assert prepared("math", problems(1), "--system", "Be brief.")[0][0]["prompt"][0]["content"] == "Be brief."
    assert [message["role"] for message in prepared("math", problems(1), "--system", "")[0][0]["prompt"]] == ["user"]


def test_prompts_too_long_for_the_student(prepared: Callable, toy: ToyRun, tmp_path: Path):
    rows = [{"problem": "1A=", "answer": "1"}, {"problem": "1" + "A" * 50 + "=", "answer": "2"}]
    options = ("--system", "", "--tokenizer", str(toy.student), "--max-prompt-tokens", "16")
    made, _ = prepared("math", rows, *options)
    assert [row["prompt"][0]["content"] for row in made] == ["1A="]
    assert [row["why"] for row in dropped(tmp_path, "math")] == ["a prompt of too many tokens"]


# ------------------------------------------------------------------------------------------ overlap

LONG = "A farmer has {} hens and twice as many ducks on a pond near the old mill; how many birds does the farmer have?"


@pytest.fixture
def evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    rows = [{"problem": LONG.format(7), "answer": "21", "id": "hens"}, {"problem": "Find $2^{10}$.", "answer": "1024"}]
    file = write(tmp_path / "evaluation.jsonl", rows)
    assert main(["amc23", "--from", str(file), "--out", str(tmp_path)]) == 0
    return tmp_path / "amc23.parquet"


OVERLAPPING = [
    {"problem": LONG.format(7).upper(), "answer": "21", "id": "same"},
    {"problem": LONG.format(8) + " Explain.", "answer": "24", "id": "like"},
    {"problem": "A question of its own kind, that is in no evaluation set at all.", "answer": "1", "id": "own"},
    {"problem": LONG.format(7), "answer": "21", "id": "copy"},
]


@pytest.mark.parametrize(
    ("drop", "kept"), [("", ["same", "like", "own"]), ("exact", ["like", "own"]), ("near", ["own"])]
)
def test_overlap_is_found_and_dropped_if_asked(
    prepared: Callable, evaluation: Path, tmp_path: Path, drop: str, kept: list[str], capsys: pytest.CaptureFixture[str]
):
    options = ["--check-overlap", str(evaluation), *(["--drop-overlap", drop] if drop else [])]
    rows, manifest = prepared("math", OVERLAPPING, *options)
    assert [row["extra_info"]["id"] for row in rows] == kept
    assert manifest["overlap"] == {"amc23.parquet": {"exact": 1, "near": 1}}
    assert manifest["overlap_checked_with"] == ["amc23.parquet"]
    assert "overlap with amc23.parquet: 1 exact, 1 near" in capsys.readouterr().out
    matches = {
        match["id"]: match for match in map(json.loads, (tmp_path / "math.overlap.jsonl").read_text().splitlines())
    }
    assert {id: (match["kind"], match["evaluation_id"]) for id, match in matches.items()} == {
        "same": ("exact", "hens"),
        "like": ("near", "hens"),
    }
    assert matches["same"]["same_answer"] and not matches["like"]["same_answer"]


def test_no_overlap_is_said_too(prepared: Callable, evaluation: Path, capsys: pytest.CaptureFixture[str]):
    _, manifest = prepared("math", problems(3), "--check-overlap", str(evaluation))
    assert manifest["overlap"] == {} and manifest["overlap_checked_with"] == ["amc23.parquet"]
    assert "no overlap with amc23.parquet" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ reasoning-gym


def test_reasoning_gym(tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    command = ["reasoning_gym/chain_sum", "--limit", "12", "--seed", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    file = tmp_path / "reasoning_gym_chain_sum.parquet"
    first, rows = file.read_bytes(), read_rows(file)
    check_rows(file, rows, VERL_COLUMNS)
    assert len({row["prompt"][1]["content"] for row in rows}) == 12
    for row in rows[:3]:
        answer = row["reward_model"]["ground_truth"]
        for said, score in ((answer, 1.0), (str(int(answer) + 1), 0.0)):
            response = f"so \\boxed{{{said}}}"
            assert compute_score(row["data_source"], response, answer, row["extra_info"], time_limit=20.0) == score
    assert main(command) == 0 and file.read_bytes() == first
    assert main([*command, "--seed", "5"]) == 0 and file.read_bytes() != first


def test_unknown_reasoning_gym_task(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("reasoning_gym")
    said = refused(capsys, "reasoning_gym/chainsum")
    assert said.startswith("reasoning-gym has no task 'chainsum'; did you mean chain_sum")


# ------------------------------------------------------------------------------------------ bad input


def test_no_name_and_an_unknown_name(capsys: pytest.CaptureFixture[str]):
    assert refused(capsys) == "Name a data set; --list shows them."
    assert "There is no data set 'gms8k'; did you mean gsm8k" in refused(capsys, "gms8k")


def test_the_list_names_every_set(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "openthoughts3" in said and "OE_TO_maths_en_COMP" in said and "reasoning_gym/TASK" in said


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "a", "label": 1}], "in.jsonl has the columns text, label; expected are prompt and reward_model"),
        ([{"problem": "", "answer": "1"}] * 2, "None of the 2 rows can be used (2 no question)."),
        (
            [{"problem": "a", "answer": "1", "id": "x"}, {"problem": "b", "answer": "1", "id": "x"}],
            "The id 'x' occurs twice, in in.jsonl: row 0 and in.jsonl: row 1",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], sentence: str):
    file = write(tmp_path / "in.jsonl", rows)
    assert sentence in refused(capsys, "aime24", "--from", file, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("", "in.jsonl has no rows."), ('{"problem": "a", "answer": "1"}\n{"problem":', "in.jsonl: line 2 is not JSON")],
)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str):
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    assert sentence in refused(capsys, "math", "--from", file, "--out", tmp_path)
    assert sentence in refused(capsys, "math", "--from", file, "--check-overlap", file, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["math", "gsm8k", "--from", "x"], "--from gives the rows of one data set; name one."),
        (["math", "--drop-overlap", "near"], "--drop-overlap needs the evaluation files: --check-overlap FILE ..."),
        (["math", "--limit", "0"], "--limit must be at least 1, got 0."),
        (["math", "--from", "/nowhere"], "There is no file or folder /nowhere."),
        (["math", "--from", "x", "--check-overlap", "/nowhere"], "There is no file or folder /nowhere."),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str):
    assert refused(capsys, *options) == sentence


def test_a_tokenizer_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "in.jsonl", problems(1))
    said = refused(capsys, "math", "--from", file, "--out", tmp_path, "--tokenizer", tmp_path / "none")
    assert said.startswith(f"--tokenizer {tmp_path}/none cannot be used (")


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "in.jsonl", problems(1))
    said = refused(capsys, "math", "--from", file, "--out", file / "below")
    assert said == f"{file}/below cannot be read or written (Not a directory)."


# ------------------------------------------------------------------------------------------ in a run


def test_the_preflight_names_the_command_that_makes_a_missing_file(tmp_path: Path):
    from verl_trb.preflight import Absent, check_validation_data

    files = [str(tmp_path / "math500.parquet"), str(tmp_path / "aime24.parquet")]
    config = OmegaConf.create({"data": {"val_files": files}})
    with pytest.raises(Absent) as absent:
        check_validation_data(config)
    assert str(absent.value) == (
        f"data.val_files: there is no file {files[0]}, {files[1]}; make it with `python -m verl_trb.prepare_data "
        f"math500 aime24 --out {tmp_path}`."
    )
    config.data.val_files = str(tmp_path / "mine.parquet")
    with pytest.raises(Absent, match=r"there is no file .*mine\.parquet\.$"):
        check_validation_data(config)


def test_the_papers_recipes_name_files_that_are_made():
    from verl_trb.data.sources import SOURCES

    for recipe in ("_paper", "qwen3_0p6b"):
        data = OmegaConf.load(ROOT / "recipes" / f"{recipe}.yaml").data
        for file in [*data.val_files, *([data.train_files] if "train_files" in data else [])]:
            assert Path(file).parent == Path("~/data/verl_trb") and Path(file).stem in SOURCES
            assert SOURCES[Path(file).stem].evaluation == (file in data.val_files)


# ------------------------------------------------------------------------------------------ the real files


@pytest.mark.skipif(not REAL, reason="VERL_TRB_REAL_DATA names no folder with AIME24, AMC23 and dapo_math_17k")
@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [("aime24", "AIME24", 30), ("amc23", "AMC23", 40), ("dapo_math_17k", "dapo_math_17k", 16_290)],
)
def test_real_files(prepared: Callable, tmp_path: Path, name: str, file: str, rows: int):
    """Every gold answer verifies itself by math-verify, directly and through the reward; its neighbours do not."""
    from math_verify import parse, verify

    made, manifest = prepared(name, Path(REAL) / f"{file}.parquet")
    assert len(made) == rows
    assert "an answer that math-verify cannot parse" not in manifest["dropped"] and not manifest["notes"]
    assert not any("on its own line" in row["prompt"][1]["content"] for row in made)
    for row in made[:: max(1, rows // 400)]:
        gold = row["reward_model"]["ground_truth"]
        wrong = [str(int(gold) + 1), str(-int(gold) - 1), gold + "0" if int(gold) else "10", f"{gold}.5"]
        for answer in [gold, f"{gold}.0", *wrong]:
            text = f"The answer is $\\boxed{{{answer}}}$."
            direct = verify(parse(f"\\boxed{{{gold}}}"), parse(text))
            assert compute_score(name, text, gold, row["extra_info"]) == float(direct) == float(answer not in wrong)


@pytest.mark.skipif(not REAL, reason="VERL_TRB_REAL_DATA names no folder with AIME24, AMC23 and dapo_math_17k")
def test_real_overlap(prepared: Callable, tmp_path: Path):
    prepared("amc23", Path(REAL) / "AMC23.parquet")
    prepared("aime24", Path(REAL) / "AIME24.parquet")
    files = [str(tmp_path / "amc23.parquet"), str(tmp_path / "aime24.parquet")]
    _, manifest = prepared("dapo_math_17k", Path(REAL) / "dapo_math_17k.parquet", "--check-overlap", *files)
    assert manifest["overlap"] == {"amc23.parquet": {"exact": 8, "near": 25}}


def test_a_line_separator_inside_a_text_does_not_end_a_json_line(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"text": "one\u2028two\x85"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(file) == [{"text": "one\u2028two\x85"}]


def test_parquet_is_what_verl_reads(prepared: Callable, tmp_path: Path, toy: ToyRun):
    """verl's own data set class gives the prompt and the answer."""
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    prepared("math", [{"problem": "1A=", "answer": "1"}], "--system", "")
    assert pyarrow.parquet.read_schema(tmp_path / "math.parquet").names[0] == "data_source"
    config = OmegaConf.create({"prompt_key": "prompt", "max_prompt_length": 16, "cache_dir": str(tmp_path / "cache")})
    dataset = RLHFDataset(str(tmp_path / "math.parquet"), AutoTokenizer.from_pretrained(toy.student), config)
    row = dataset[0]
    assert row["raw_prompt"] == [{"role": "user", "content": "1A="}]
    assert row["reward_model"]["ground_truth"] == "1" and row["data_source"] == "math"

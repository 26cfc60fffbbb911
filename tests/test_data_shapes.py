"""Every shape that math data circulates in, and every format of file, gives the same questions and answers."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_trb.data.files import data_files, read_files
from verl_trb.data.shapes import Fault, find_shape, gold_answer, read_example
from verl_trb.data.sources import SOURCES, find_source
from verl_trb.errors import UserError

SOLUTION = "We add.\nThen $2+2=4$, so the answer is $\\boxed{\\frac{8}{2}}$."
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is $2+2$?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ASK, REPLY = {"role": "user", "content": "What is $2+2$?"}, {"role": "assistant", "content": SOLUTION}

# row -> (answer, id) of the question "What is $2+2$?"
SHAPES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "verl": ({"prompt": [ASK], "reward_model": {"ground_truth": "4"}, "extra_info": {"index": "a1"}}, "4", "a1"),
    "verl, boxed": ({"prompt": [ASK], "reward_model": {"ground_truth": "\\boxed{4}"}}, "4", None),
    "verl, as text": ({"prompt": [ASK], "reward_model": '{"ground_truth": "4"}'}, "4", None),
    "verl, with a system prompt": (
        {"prompt": [{"role": "system", "content": "Think."}, ASK], "reward_model": {"ground_truth": "4"}},
        "4",
        None,
    ),
    "verl, wrapped by DAPO": (
        {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "4"}},
        "4",
        None,
    ),
    "problem and answer": ({"problem": "What is $2+2$?", "answer": "4", "unique_id": "t/1.json"}, "4", "t/1.json"),
    "a number": ({"problem": "What is $2+2$?", "answer": 4, "id": 0}, "4", "0"),
    "a number among gaps": ({"question": "What is $2+2$?", "answer": 4.0}, "4", None),
    "names with capitals": ({"ID": "x", "Problem": "What is $2+2$?", "Solution": SOLUTION, "Answer": 4}, "4", "x"),
    "GSM8K": ({"question": "What is $2+2$?", "answer": "2+2 = <<2+2=4>>1,004\n#### 1,004"}, "1004", None),
    "MATH": ({"problem": "What is $2+2$?", "level": "Level 1", "solution": SOLUTION}, r"\frac{8}{2}", None),
    "DeepMath": (
        {"question": "What is $2+2$?", "final_answer": "4", "r1_solution_1": "\\boxed{5}", "topic": "Algebra"},
        "4",
        None,
    ),
    "OlympiadBench": ({"id": 7, "question": "What is $2+2$?", "solution": ["…"], "final_answer": ["4"]}, "4", "7"),
    "several answers": ({"question": "What is $2+2$?", "final_answer": ["$4$", "5"]}, "$4$, 5", None),
    "messages": ({"messages": [ASK, REPLY]}, r"\frac{8}{2}", None),
    "messages with an answer": ({"messages": [ASK, REPLY], "answer": "4"}, "4", None),
    "messages as text": ({"messages": json.dumps([ASK, REPLY])}, r"\frac{8}{2}", None),
    "OpenThoughts3": (
        {
            "difficulty": None,
            "domain": "math",
            "conversations": [
                {"from": "human", "value": "What is $2+2$?"},
                {"from": "gpt", "value": f"<think>\\boxed{{3}}? No.</think>{SOLUTION}"},
            ],
        },
        r"\frac{8}{2}",
        None,
    ),
    "wrapped by verl's examples": (
        {
            "question": 'What is $2+2$? Let\'s think step by step and output the final answer after "####".',
            "answer": "#### 4",
        },
        "4",
        None,
    ),
    "an instruction at the end": (
        {
            "problem": "What is $2+2$?\nPlease reason step by step, and put your final answer within \\boxed{}.",
            "answer": "4",
        },
        "4",
        None,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str):
    row, answer, identity = SHAPES[name]
    example = read_example(find_shape("file", row), row)
    assert (example.question, example.answer, example.id) == ("What is $2+2$?", answer, identity)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"problem": "", "answer": "4"}, "no question"),
        ({"problem": None, "answer": "4"}, "no question"),
        ({"problem": "p", "answer": None}, "no answer"),
        ({"problem": "p", "answer": " $ $ "}, "no answer"),
        ({"problem": "p", "solution": "It is 4."}, "no boxed answer in its solution"),
        ({"problem": "p", "solution": None}, "no boxed answer in its solution"),
        ({"messages": [ASK]}, "no answer"),
        ({"messages": [REPLY]}, "no question"),
        ({"messages": [ASK, REPLY, ASK, REPLY]}, "a chat with 2 user messages"),
        ({"messages": "hello"}, "its chat is not a list of messages"),
        ({"messages": ["hello"]}, "its chat is not a list of messages"),
        ({"messages": [ASK, {"role": "assistant", "content": "4, surely"}]}, "no boxed answer in its solution"),
        ({"prompt": [ASK], "reward_model": {}}, "no answer"),
        ({"prompt": [ASK], "reward_model": "4"}, "its reward_model is not a record"),
        ({"question": "q", "answer": "4", "image_1": {"bytes": b"x"}}, "it needs an image"),
    ],
)
def test_a_row_that_cannot_be_used(row: dict[str, Any], fault: str):
    with pytest.raises(Fault) as raised:
        read_example(find_shape("file", row), row)
    assert str(raised.value) == fault


def test_context_comes_before_the_question():
    row = {"context": "Let $x=2$.", "question": "What is $2x$?", "final_answer": ["4"]}
    assert read_example(find_shape("file", row), row, "context").question == "Let $x=2$.\nWhat is $2x$?"
    assert read_example(find_shape("file", row), row | {"context": None}, "context").question == "What is $2x$?"


def test_columns_that_are_asked_for():
    row = {"aufgabe": "What is $2+2$?", "loesung": "4", "answer": "5"}
    example = read_example(find_shape("file", row, "aufgabe", "loesung"), row)
    assert (example.question, example.answer) == ("What is $2+2$?", "4")
    with pytest.raises(UserError, match=r"file has no column 'lösung'; it has aufgabe, loesung, answer\."):
        find_shape("file", row, "aufgabe", "lösung")


def test_wrong_columns_say_what_is_there_and_what_is_expected():
    with pytest.raises(UserError) as refused:
        find_shape("file", {"text": "a", "label": 1})
    assert "file has the columns text, label; expected are prompt and reward_model (verl), messages" in str(
        refused.value
    )
    assert "problem/question" in str(refused.value) and "--question-column" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        (" $4$. ", "4"),
        (r"\boxed{4}", "4"),
        ("x\n#### 4", "4"),
        ("#### -1,234.5", "-1234.5"),
        ("1, 2", "1, 2"),
    ],
)
def test_gold_answer(text: str, answer: str):
    assert gold_answer(text) == answer


# ------------------------------------------------------------------------------------------ files

ROWS = [
    {"problem": "What is 1+1?", "answer": "2"},
    {"problem": 'A "quoted", with\na line\u2028and é', "answer": "\\frac{1}{2}"},
    {"problem": "Third\x85?", "answer": "3"},
]


def write_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(ROWS), file)


def write_arrow(file: Path, stream: bool = True) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    open_writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with open_writer(str(file), table.schema) as writer:
        writer.write_table(table)


def write_csv(file: Path, delimiter: str = ",") -> None:
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, ["problem", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def lines() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "b.arrow": lambda file: write_arrow(file, stream=False),
    "a.jsonl": lambda file: file.write_text(lines(), encoding="utf-8"),
    "b.jsonl": lambda file: file.write_text("\ufeff\n" + lines() + "\n\n", encoding="utf-8"),
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines().encode())),
    "a.json": lambda file: file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "b.json": lambda file: file.write_text(lines(), encoding="utf-8"),
    "a.csv": write_csv,
    "a.tsv": lambda file: write_csv(file, "\t"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str, tmp_path: Path):
    file = tmp_path / name
    FORMATS[name](file)
    rows = list(read_files(file, data_files(file, "train")))
    assert [row.values for row in rows] == ROWS
    assert [(row.file, row.number) for row in rows] == [(name, 0), (name, 1), (name, 2)]


def test_folder_as_the_datasets_library_saves_it(tmp_path: Path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "saved")
    files = data_files(tmp_path / "saved", "test")
    assert [row.values for row in read_files(tmp_path / "saved", files)] == ROWS[:1]


def test_folder_of_the_hub_gives_the_files_of_a_split_in_order(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet")
    write_parquet(tmp_path / ".cache" / "train.parquet")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    files = data_files(tmp_path, "train")
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [row.file for row in read_files(tmp_path, files)][::3] == [f"data/{file.name}" for file in files]
    with pytest.raises(UserError, match="has files of the splits test, train, and none of 'validation'"):
        data_files(tmp_path, "validation")


def test_folder_with_a_file_a_problem(tmp_path: Path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    assert [row.values for row in read_files(tmp_path, data_files(tmp_path, "train"))] == ROWS


def test_without_split_names_all_files_are_read(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(lines(), encoding="utf-8")
    assert [file.name for file in data_files(tmp_path, "train")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl: line 1 is not a JSON object."),
        ("a.jsonl", b"", "a.jsonl has no rows."),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl is damaged: after 0 rows"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], "a.jsonl.gz is damaged"),
        ("a.json", b"[{", "a.json is not JSON"),
        ("a.json", b"[1]", "a.json: item 0 is not a JSON object."),
        ("a.json", b"[]", "a.json has no rows."),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.parquet", b"PAR1 half a file", "a.parquet is damaged"),
        ("a.arrow", b"half a file", "a.arrow is damaged"),
        ("a.csv", b'a,b\n1,"2', "a.csv is damaged: after 0 rows"),
        ("a.csv", b"a,b\n", "a.csv has no rows."),
        ("a.txt", b"hello", "a.txt is none of .parquet, .arrow, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        list(read_files(file, data_files(file, "train")))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_no_such_path_and_an_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match="There is no file or folder /nowhere"):
        data_files(Path("/nowhere"), "train")
    with pytest.raises(UserError, match="has no data file"):
        data_files(tmp_path, "train")


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("MATH-500", "math500"),
        ("open-thoughts/OpenThoughts3-1.2M", "openthoughts3"),
        ("aime_25", "aime25"),
        ("gms8k", "gsm8k"),
    ],
)
def test_an_unknown_name_has_near_matches(asked: str, near: str):
    with pytest.raises(UserError, match=f"There is no data set '{asked}'; did you mean .*{near}"):
        find_source(asked)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(UserError, match="there are openthoughts3, dapo_math_17k, .*gsm8k_test"):
        find_source("zzzz")


def test_the_papers_sets_are_all_there():
    assert {name for name, source in SOURCES.items() if not source.evaluation} == {
        "openthoughts3", "dapo_math_17k", "deepmath_103k", "gsm8k", "math"
    }  # fmt: skip
    assert {name for name, source in SOURCES.items() if source.evaluation} == {
        "math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva", "gsm8k_test"
    }  # fmt: skip
    assert SOURCES["openthoughts3"].limit == 25_600 and SOURCES["openthoughts3"].keep == ("domain", "math")

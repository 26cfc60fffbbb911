"""A real vLLM CPU engine for the tests: tiny model pairs, and the engine that blends them.

The engine runs inside the test process (vLLM's in-process mode), so `torch.manual_seed` decides every draw.
Nothing here is a mock: `BlendedEngine` differs from the server only in driving vLLM's offline `LLM`.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Before vLLM is imported: one process, no thread pinning, a small KV cache, the model runner we hook into.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import verl_trb.platforms  # noqa: F401  lets vllm-cpu answer for vllm, as `import verl` does where we are installed
from verl_trb.policies import get_policy
from verl_trb.rollout.engine_args import ENGINE_ENVIRONMENT, blended_engine_args
from verl_trb.rollout.generation import Answer, Rollout, generate_blended
from verl_trb.rollout.request import BlendedRequest
from verl_trb.vocabulary import SharedVocabulary, from_tokenizers

VOCABULARY = 128
PAD, EOS, TEACHER_EOS = 0, 1, 2
STUDENT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TEACHER = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def save_tokenizer(folder: Path, eos: int = EOS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 128 ids whose EOS is id `eos`; its pad token serves as the marker."""
    words = {"<pad>": PAD, "<eos>": EOS, "<end>": TEACHER_EOS}
    words.update({f"w{i}": i for i in range(len(words), VOCABULARY)})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos_token = next(word for word, index in words.items() if index == eos)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def tiny_model(seed: int, tied: bool = False, eos: int = EOS, **shape: int) -> Qwen3ForCausalLM:
    """A random Qwen3 whose next-token distributions are peaked and often contain EOS."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **shape,
        vocab_size=VOCABULARY,
        intermediate_size=shape["hidden_size"] * 3 // 2,
        head_dim=32,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        eos_token_id=eos,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[eos] *= 2.0  # likely in some contexts, negligible in others
    return model


Guidance = float | dict[str, float] | None


@dataclass(frozen=True)
class Pair:
    """Two model folders with their tokenizers, and the vocabulary they share."""

    student: Path
    teacher: Path
    vocabulary: SharedVocabulary


def make_pair(folder: Path, *, teacher_eos: int = EOS, tied: bool = False, same: bool = False, seed: int = 0) -> Pair:
    """A student and a teacher of different width, depth and head counts (`same`: the student twice)."""
    student, teacher = folder / "student", folder / "teacher"
    tiny_model(seed + 1, tied, **STUDENT).save_pretrained(student)
    tokenizers = save_tokenizer(student), save_tokenizer(teacher, teacher_eos)
    if same:
        tiny_model(seed + 1, tied, **STUDENT).save_pretrained(teacher)
    else:
        tiny_model(seed + 2, eos=teacher_eos, **TEACHER).save_pretrained(teacher)
    vocabulary = from_tokenizers(*tokenizers, student_rows=VOCABULARY, teacher_rows=VOCABULARY)
    return Pair(student, teacher, vocabulary)


class BlendedEngine:
    """vLLM's offline engine with the behavior policy installed, driven like the server drives its own."""

    def __init__(self, pair: Pair, draft_tokens: int, policy: str = "trb", **overrides: Any) -> None:
        # The id is part of the weight sync's socket name: two test runs on one machine must not share it.
        os.environ.update({**ENGINE_ENVIRONMENT, "VERL_RAY_JOB_ID": f"test-{os.getpid()}"})
        from verl.workers.rollout.vllm_rollout import utils
        from vllm import LLM

        # verl asks for SIGKILL when the engine's parent ends; here that would be the test process's parent.
        utils.set_death_signal = lambda: None
        self.pair, self.vocabulary, self.draft_tokens = pair, pair.vocabulary, draft_tokens
        arguments: dict[str, Any] = {
            "model": str(pair.teacher),
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 1024,
            "block_size": 16,
            "enforce_eager": True,
            "seed": 0,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "kv_cache_memory_bytes": 1 << 26,
            **blended_engine_args(str(pair.student), draft_tokens),
            **overrides,
        }
        self.llm = LLM(**arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.worker = self.core.model_executor.driver_worker.worker
        self.preemptions, self.broken = 0, False
        self.blocks: dict[str, list[int]] = {}
        self.corrected: dict[str, list[list[bool]]] = {}
        self.install(policy)
        self._count_preemptions()

    def install(self, policy: str) -> None:
        """The behavior policy of that name, as the server installs it; and a record of every block: its size, and
        which of its tokens are not what the student drafted.
        """
        settings = {"policy": policy, "vocabulary": asdict(self.vocabulary)}
        self.llm.collective_rpc("install_behavior_policy", kwargs=settings)
        runner = self.worker.model_runner
        sampling, drafter, batch = runner.rejection_sampler.sampling, runner.drafter, runner.input_batch
        draw = sampling.draw

        def recorded(*args: Any) -> Any:
            output = draw(*args)
            block = drafter.verifying
            for request_id, tokens_C in zip(batch.req_ids, output.sampled_token_ids, strict=True):
                if block is not None and request_id in block.place:
                    emitted = tokens_C[tokens_C >= 0]
                    self.blocks.setdefault(request_id, []).append(len(emitted))
                    other = emitted != block.tokens_BG[block.place[request_id], : len(emitted)]
                    self.corrected.setdefault(request_id, []).append(other.tolist())
            return output

        sampling.draw = recorded

    def use(self, policy: str) -> None:
        """Another policy in the same engine."""
        self.worker.model_runner.rejection_sampler.sampling.policy = get_policy(policy)

    def _count_preemptions(self) -> None:
        preempt = self.core.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        self.core.scheduler._preempt_request = counted

    def statistics(self) -> dict[str, float]:
        return self.llm.collective_rpc("take_rollout_statistics")[0]

    def generate(self, prefixes: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's own request outputs for token-id prompts."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(prefix)} for prefix in prefixes]
        assert not self.broken, "an earlier error left requests in the engine"
        self.broken = True
        outputs = self.llm.generate(prompts, [SamplingParams(**p) for p in params], use_tqdm=False)
        self.broken = False
        return outputs

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | Sequence[Guidance],
        max_tokens: int | Sequence[int],
        temperature: float | Sequence[float] = 1.0,
        keep: int | None = None,
    ) -> list[Rollout]:
        """`generate_blended` for all prompts at a time: every round of submissions is one call of the engine.

        guidance: the policy's parameters, or ε in short; 0 and None are the student. keep: k of what is kept of the
        teacher's, by `take_kept` of a prompt's number.
        A rollout's `raw` is the last request's output, with the sizes of its blocks as `raw.blocks`, and whether
        each token differs from its draft as `raw.corrected`.
        """
        columns = [
            list(value) if isinstance(value, (list, tuple)) else [value] * len(prompts)
            for value in (guidance, max_tokens, temperature)
        ]
        columns[0] = [({"epsilon": g} if g else None) if isinstance(g, (int, float)) else g for g in columns[0]]
        self.blocks.clear()
        self.corrected.clear()
        columns.append([None if keep is None else (str(number), keep) for number in range(len(prompts))])
        return asyncio.run(self._rollouts([list(prompt) for prompt in prompts], *columns))

    async def _rollouts(
        self,
        prompts: list[list[int]],
        params: list[Any],
        budgets: list[int],
        temperatures: list[float],
        keeps: list[tuple[str, int] | None],
    ) -> list[Rollout]:
        pending: list[tuple[list[int], dict[str, Any], asyncio.Future]] = []
        vocabulary = self.vocabulary

        async def rollout(prompt: list[int], guided: Any, max_tokens: int, temperature: float, keep: Any) -> Rollout:
            async def submit(prefix: list[int], request: BlendedRequest, budget: int, round_: int) -> Answer:
                settings = {
                    "temperature": temperature,
                    "max_tokens": budget,
                    "logprobs": 0,
                    "stop_token_ids": [vocabulary.student_eos, vocabulary.marker],
                    "extra_args": replace(request, keep=keep).extra_args(),
                    "detokenize": False,
                }
                future = asyncio.get_running_loop().create_future()
                pending.append((prefix, settings, future))
                return await future

            stop_ids = [vocabulary.student_eos]
            return await generate_blended(submit, prompt, max_tokens, guided, vocabulary.marker, stop_ids)

        each = zip(prompts, params, budgets, temperatures, keeps, strict=True)
        tasks = [asyncio.ensure_future(rollout(*arguments)) for arguments in each]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            if not pending:
                continue
            batch, pending[:] = list(pending), []
            outputs = self.generate([b[0] for b in batch], [b[1] for b in batch])
            for (_, _, future), output in zip(batch, outputs, strict=True):
                completion = output.outputs[0]
                ids = list(completion.token_ids)
                entries = zip(ids, completion.logprobs, strict=True)
                logprobs = [entry[token].logprob for token, entry in entries]
                output.blocks = self._blocks_of(self.blocks, output.request_id)
                output.corrected = [
                    flag for block in self._blocks_of(self.corrected, output.request_id) for flag in block
                ]
                future.set_result(Answer(ids, logprobs, completion.finish_reason, raw=output))
        return [task.result() for task in tasks]

    def _blocks_of(self, record: dict[str, list[Any]], request_id: str) -> list[Any]:
        """What was recorded of a request's blocks; vLLM appends a suffix to the ids it uses inside."""
        prefix = f"{request_id}-"
        return next((v for k, v in record.items() if k == request_id or k.startswith(prefix)), [])

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.worker
        cleanup_dist_env_and_memory()
        gc.collect()


@contextmanager
def engine(pair: Pair, draft_tokens: int, **overrides: Any) -> Iterator[BlendedEngine]:
    """One engine, always shut down; only one may be alive in the process."""
    blended = BlendedEngine(pair, draft_tokens, **overrides)
    try:
        yield blended
    finally:
        blended.close()

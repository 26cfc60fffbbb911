"""Responses of one model: plain vLLM, temperature 1, nothing cut off the distribution, prompts and ends as in training.

Every sample has a seed of its own, made from the command's, the set's name, the problem's id and its own number: what
is drawn does not depend on what else is in the batch, or on what was drawn before the command was stopped, up to the
rounding of the model's logits.
"""

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from verl_trb.errors import UserError

CPU_CACHE_BYTES, CPU_SEQUENCES = 1 << 30, 64
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class EngineFailed(RuntimeError):
    """vLLM failed in the middle; samples that are written stay."""


class Request(NamedTuple):
    key: str  # unique in one call
    prompt_ids: list[int]
    seed: int


class Response(NamedTuple):
    key: str
    text: str
    tokens: int
    finish: str


def sample_seed(seed: int, set_name: str, problem_id: str, index: int) -> int:
    """The seed of one sample, 62 bits."""
    digest = hashlib.sha256(f"{seed}\n{set_name}\n{problem_id}\n{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def load_tokenizer(name: str, folder: str) -> Any:
    """The model's tokenizer, which must have a chat template. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The model {name}: its tokenizer in {folder} cannot be loaded ({reason}).") from None
    if not tokenizer.chat_template:
        raise UserError(f"The model {name} has no chat template, which makes the prompts; add one to its tokenizer.")
    return tokenizer


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> list[int]:
    """The prompt as a run makes it of the same row; options: data.apply_chat_template_kwargs."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_ids(tokenizer: Any, folder: str) -> list[int]:
    """Ids that end a response: the tokenizer's EOS, as in training, and those of the model's generation defaults."""
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # it has none
        named = None
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(id_ for id_ in ids if id_ is not None)


class Engine:
    """vLLM with one model; a context manager, because only one may be alive."""

    def __init__(self, folder: str, tokenizer: Any, *, dtype: str, length: int, options: dict[str, Any]) -> None:
        """length: tokens of prompt and response. options: further arguments of vLLM's LLM. Raises UserError."""
        from verl.utils.device import get_device_name

        import verl_trb.platforms  # noqa: F401  lets vllm-cpu answer for vllm

        arguments: dict[str, Any] = {
            "model": folder,
            "dtype": dtype,
            "max_model_len": length,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
        }
        if get_device_name() == "cpu":
            os.environ.update(CPU_ENVIRONMENT)
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": CPU_CACHE_BYTES,
                "max_num_seqs": CPU_SEQUENCES,
            }
            # A prompt read in pieces makes vLLM wind a request's random generator back, which torch's on a CPU cannot.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, length)}
        from vllm import LLM

        try:
            self.llm = LLM(**{**arguments, **options})
        except Exception as error:  # vLLM's own, pydantic's, torch's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
            raise UserError(f"vLLM cannot load the model {folder} ({reason}).") from error
        self.tokenizer, self.ends = tokenizer, end_ids(tokenizer, folder)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def respond(self, requests: Iterable[Request], max_tokens: int) -> Iterator[Response]:
        """Each request's response once it is finished, in no order."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for request in requests:
            params = SamplingParams(
                temperature=1.0,
                top_p=1.0,
                top_k=-1,
                seed=request.seed,
                max_tokens=max_tokens,
                stop_token_ids=self.ends,
                detokenize=False,
            )
            engine.add_request(request.key, {"prompt_token_ids": request.prompt_ids}, params)
        while engine.has_unfinished_requests():
            try:
                outputs = engine.step()
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
                raise EngineFailed(f"vLLM failed while it was sampling ({reason})") from error
            for output in outputs:
                if output.finished:
                    answer = output.outputs[0]
                    ids = list(answer.token_ids)
                    # As verl decodes what its reward functions read.
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    yield Response(output.request_id, text, len(ids), answer.finish_reason or "stop")

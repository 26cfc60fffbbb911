"""The vLLM arguments that make an engine a sampler of μ; shared by the server, the tests and the benchmarks."""

from typing import Any

from verl_trb.rollout.padded_student import with_rows


def blended_engine_args(
    student: str, draft_tokens: int, tensor_parallel_size: int = 1, student_rows: int = 0, teacher_rows: int = 0
) -> dict[str, Any]:
    """Arguments for an engine whose own model is the teacher.

    Args:
        student: Hugging Face folder of the student, which becomes vLLM's draft model.
        draft_tokens: γ, drafts per block, ≥ 1.
        tensor_parallel_size: of the teacher; vLLM wants the student's to be the same.
        student_rows, teacher_rows: rows of the two embeddings, where they differ.
    """
    from verl_trb.rollout.cpu_kernels import kernel_arguments  # vLLM, which checking a configuration does not need

    return {
        **kernel_arguments(),
        "speculative_config": {
            "method": "draft_model",
            "model": with_rows(student, student_rows, teacher_rows),
            "num_speculative_tokens": draft_tokens,
            "draft_sample_method": "probabilistic",
            "draft_tensor_parallel_size": tensor_parallel_size,
        },
        # The teacher is never synced: it must come from disk, not from verl's default "dummy".
        "load_format": "auto",
        # The next block needs this block's last token on the host: see docs/performance.md.
        "async_scheduling": False,
        # One worker lives in the engine's own process: no second start-up, no shared memory to leave behind.
        "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        # Stop ids come with each request; the teacher's own generation defaults must not end a rollout.
        "generation_config": "vllm",
        "worker_extension_cls": "verl_trb.rollout.worker_extension.BlendedWorkerExtension",
    }


ENGINE_ENVIRONMENT = {
    # The acceptance rule hooks into vLLM's V1 model runner; V2 is the default for some models on GPU.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # On a CPU vLLM turns "uni" into "mp" unless this is off; the asynchronous engine has its own process either way.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

# trb.deterministic: one request at a time and nothing cached of others, because the last digits of a row's logits
# depend on the rows beside it, and the generators are the whole engine's.
ONE_BY_ONE = {"max_num_seqs": 1, "enable_prefix_caching": False}


def model_length(prompt_length: int, response_length: int, draft_tokens: int) -> int:
    """The smallest `max_model_len` (tokens) in which no row loses its drafts for want of room.

    The last block starts one token before the end. Verifying it takes γ more positions, and vLLM skips the
    drafter, for the whole batch, where another γ would not fit behind those.
    """
    return prompt_length + response_length + 2 * draft_tokens - 1


def batched_tokens(max_num_seqs: int, draft_tokens: int) -> int:
    """The smallest `max_num_batched_tokens` in which every running sequence gets its whole block.

    Of each sequence the scheduler counts its last token, γ drafts and one more that only the drafter reads.
    """
    return max_num_seqs * (draft_tokens + 2)

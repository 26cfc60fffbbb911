"""Bytes on one device, by part, in the phases of a training step; and how far two sizes can be raised.

A pure function of `Job`. The phases, of which the largest decides:

    rollouts    the training worker's resident state beside the engine: both models, their KV caches, the sampler
    loss        forward and backward of the student: activations, a chunk's logits, layers gathered from their shards
    optimizer   the gradients of all parameters and AdamW's temporaries

Letters in comments: P parameters, V vocabulary, D devices that share the training state.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_trb.planning.shapes import Shape

Parts = dict[str, int]

# Tensors [tokens, V] in float32 that the loss holds of one chunk, forward and backward together: logits of both
# models, what becomes of them, a gradient. The exact loss reuses its scratch; the others work out of place.
CHUNK_TENSORS = {"full": 5.2, "topk": 10.0, "sampled": 5.2}
CHUNK_ROUNDED = 1.6  # more with 16-bit passes, for the exact loss: logits as they come and the gradient as it goes
# Tensors [rows, V] in float32 per drafted row in the sampler: the student's probabilities as vLLM keeps them and their
# logarithm, the teacher's logits and log-probabilities, log mu, and one that the solver works in.
SAMPLER_TENSORS = 6.0
# What glibc's arenas hold on a CPU beyond the tensors of the loss phase, as a share of them: found with
# scripts/check_plan.py on its two smaller sizes (docs/planning.md has all three).
HOST_SLACK = 0.3


@dataclass(frozen=True)
class Job:
    """What decides about memory. Bytes are of one number: `master` of the trained weights and the optimizer, `compute`
    of the training passes, `teacher_bytes` of the teacher's training copy, `engine` of rollouts.

    shards: devices the training state is shared by. micro_tokens: tokens of a micro-batch on a device, padded.
    adapters: parameters of low-rank adapters, which then are all that is trained; 0 without.
    micro_batches: of one optimizer step. kv_bytes: the engine's KV cache where it is set, else what
    gpu_memory_utilization leaves. sleeps: whether the engine's memory is free during training.
    reserve: bytes for what is no part of the models (a context of CUDA, fragments, the processes themselves on a CPU).
    host: whether the device is a CPU.
    """

    student: Shape
    teacher: Shape
    memory: int
    shards: int = 1
    tensor_parallel: int = 1
    adapters: int = 0
    master: int = 4
    compute: int = 2
    teacher_bytes: int = 2
    engine: int = 2
    prompt: int = 1024
    response: int = 1024
    max_num_seqs: int = 256
    draft_tokens: int = 4
    utilization: float = 0.5
    kv_bytes: int | None = None
    micro_tokens: int = 16_384
    micro_batches: int = 2
    chunk_tokens: int = 1024
    loss: str = "full"
    checkpointing: bool = True
    offload_teacher: bool = False
    offload_parameters: bool = False
    offload_optimizer: bool = False
    sleeps: bool = True
    reserve: int = 0
    host: bool = False

    @property
    def trained(self) -> int:
        """Parameters with a gradient and an optimizer's state."""
        return self.adapters or self.student.parameters

    @property
    def kv_token(self) -> int:
        """Bytes of one token in the caches of both models."""
        return self.engine * (self.student.kv_elements + self.teacher.kv_elements) // self.tensor_parallel

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.response


def phases(job: Job) -> dict[str, Parts]:
    """Phase -> part -> bytes."""
    kept, asleep = resident(job), {} if job.sleeps else engine(job)
    return {
        "rollouts": {**offloaded(job, kept), **engine(job), **reserve(job)},
        "loss": {**kept, **asleep, **loss_phase(job), **reserve(job)},
        "optimizer": {**kept, **asleep, **optimizer_phase(job), **reserve(job)},
    }


def peak(job: Job) -> int:
    """Bytes of the largest phase."""
    return max(sum(parts.values()) for parts in phases(job).values())


def resident(job: Job) -> Parts:
    """What the training worker holds from the second step on."""
    shard = (job.student.parameters + job.adapters) // job.shards
    moments = 2 * job.master * (job.trained // job.shards)
    teacher = 0 if job.offload_teacher else job.teacher_bytes * job.teacher.parameters // job.shards
    return {"student weights": job.master * shard, "optimizer": moments, "teacher shards": teacher}


def offloaded(job: Job, kept: Parts) -> Parts:
    """The resident state while rollouts are drawn: verl may keep parts of it on the host meanwhile."""
    gone = {"student weights": job.offload_parameters, "optimizer": job.offload_optimizer}
    return {name: 0 if gone.get(name) else size for name, size in kept.items()}


def engine(job: Job) -> Parts:
    """The rollout engine: both models, the KV cache in the models' proportion, and what the sampler holds."""
    weights = {
        "engine: teacher weights": job.engine * job.teacher.parameters // job.tensor_parallel,
        "engine: student weights": job.engine * job.student.parameters // job.tensor_parallel,
    }
    if job.host:
        # vLLM's CPU layers compute with packed copies and free the originals, but not the embedding's: it has a packed
        # copy that nobody uses, and where it is the output layer, too, that one's.
        for name, shape in (("teacher", job.teacher), ("student", job.student)):
            weights[f"engine: {name} weights"] += job.engine * shape.head * (2 if shape.tied else 1)
    cache = job.kv_bytes
    if cache is None:
        cache = max(int(job.utilization * job.memory) - sum(weights.values()), 0)
    share = job.student.kv_elements / (job.student.kv_elements + job.teacher.kv_elements)
    if job.host:
        # A sync keeps what arrives until a layer is complete, and the layers it makes until they are packed.
        weights["engine: student in transit"] = job.engine * (2 * job.student.parameters + job.student.head)
    return {
        **weights,
        "engine: teacher KV cache": round(cache * (1 - share)),
        "engine: student KV cache": round(cache * share),
        "engine: sampler": sampler(job),
    }


def sampler(job: Job) -> int:
    """Probabilities over the vocabulary of a block's rows: they come on top of gpu_memory_utilization, because vLLM
    takes its measure with its own sampler.
    """
    return int(SAMPLER_TENSORS * 4 * job.max_num_seqs * job.draft_tokens * job.teacher.vocabulary)


def kv_budget(job: Job) -> int:
    parts = engine(job)
    return parts["engine: teacher KV cache"] + parts["engine: student KV cache"]


def loss_phase(job: Job) -> Parts:
    """Beyond the resident state, at the loss of a micro-batch and the beginning of its backward pass."""
    student, teacher = job.student, job.teacher
    gradients = job.master * job.trained // job.shards if job.micro_batches > 1 else 0
    # FSDP2 gathers a layer before it is used and prefetches the next; the root, which has the output layer, is gathered
    # at the loss. Its gradient exists whole, and once more while it is reduced in float32. The teacher's output layer
    # is gathered for the loss.
    gathered = job.compute * (2 * student.layer + student.head)
    gathered += 0 if job.adapters else (job.compute + 4) * student.head
    gathered += job.teacher_bytes * teacher.head
    parts = {
        "gradients": gradients,
        "gathered layers": gathered,
        "logits chunk": logits_chunk(job),
        "activations": activations(job, job.micro_tokens),
    }
    if job.host:
        parts["allocator's slack"] = int(HOST_SLACK * sum(parts.values()))
    return parts


def optimizer_phase(job: Job) -> Parts:
    """Beyond the resident state, when AdamW steps: gradients, and on a GPU its temporary of the parameters' size."""
    size = job.master * job.trained // job.shards
    return {"gradients": size, "optimizer's temporaries": 0 if job.host else size}


def logits_chunk(job: Job) -> int:
    """What the loss holds of one chunk, and the gradient it keeps where it is small (chunked_loss.py). On a CPU a chunk
    has at most 2^24 logits."""
    vocabulary = job.student.vocabulary
    tokens = min(job.chunk_tokens, job.micro_tokens)
    if job.host:
        tokens = min(tokens, max(1, 2**24 // vocabulary))
    tensors = CHUNK_TENSORS[job.loss] + (CHUNK_ROUNDED if job.compute < 4 and job.loss != "topk" else 0)
    every = job.micro_tokens * vocabulary
    return int(tensors * 4 * tokens * vocabulary) + (job.compute * every if every <= 2**26 else 0)


def activations(job: Job, tokens: int) -> int:
    """What backward needs of `tokens` tokens, and the hidden states that both models hand to the loss."""
    per_token = layer_activations(job.student, job.compute)
    kept = job.student.layers * (job.compute * job.student.hidden if job.checkpointing else per_token)
    working = per_token + job.compute * (2 * job.student.intermediate + 2 * job.student.hidden)
    handed = 4 * job.student.hidden + 2 * job.teacher_bytes * job.teacher.hidden
    return tokens * (kept + working + handed)


def layer_activations(shape: Shape, compute: int) -> int:
    """Bytes a token that one layer keeps for its backward pass, without checkpointing.

    h hidden, q queries, k keys or values, i intermediate: each of two norms keeps its input, the normalized one (in
    float32) and its output; the attention q and k before and after their norms and the rotation, the expanded keys and
    values, its output; the MLP four i. With 16-bit passes the norms' copies in float32 come on top.
    """
    h, i = shape.hidden, shape.intermediate
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms_on_heads = 2 * (q + k) if shape.norms_on_heads else 0
    numbers = 6 * h + 2 * q + 3 * k + norms_on_heads + 2 * q + 4 * i
    upcast = (2 * h + norms_on_heads // 2) * 2 * (4 - compute) if compute < 4 else 0
    return compute * numbers + upcast


def reserve(job: Job) -> Parts:
    return {"reserve": job.reserve} if job.reserve else {}


def most_sequences(job: Job, length: float) -> int:
    """Sequences of `length` tokens that fit into the KV cache together."""
    return int(kv_budget(job) // (job.kv_token * length))


def most_micro_tokens(job: Job) -> int:
    """The largest micro-batch, in tokens, with which the loss phase fits; 0 where nothing does."""
    token = activations(job, 1) * (1 + HOST_SLACK if job.host else 1)
    fixed = sum(phases(job)["loss"].values()) - token * job.micro_tokens
    return max(int((job.memory - fixed) // token), 0)

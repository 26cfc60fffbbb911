"""Runs a divergence over many tokens, in chunks: no float32 [N, V] tensor of either model outlives a chunk.

Gradients are the divergence's own (divergences.py) and flow to the student only. Two entrances: student logits that
exist already, and both models' output layers, whose logits exist for one chunk at a time.

Shapes: N tokens (prefixes), C tokens of a chunk, B of a block of it, V vocabulary, D and E hidden sizes of student and
teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_trb.divergences import Integrand, Prefixes, reverse_kl
from verl_trb.exact_rows import exact_gradient, exact_rows
from verl_trb.scratch import ThreadScratch, most_rows
from verl_trb.vocabulary import Role, SharedVocabulary, canonicalize

# (student logits of some tokens, the teacher's if the loss reads them, which tokens, upstream_JC or None)
#   -> (values_KC, and sum_j upstream_j d values_j / d logits over the shared vocabulary or None).
# J may be less than the number of differentiable values: the others' upstream is 0 then.
RowLoss = Callable[[Tensor, Tensor | None, slice, Tensor | None], tuple[Tensor, Tensor | None]]

# Logits of a chunk on a CPU, at most, in the models' dtype: more save no time. They are looked at in float32 by blocks,
# which stay in the cache. These buffers are kept.
CPU_CHUNK, CPU_BLOCK = 2**24, 2**20
_SCRATCH = ThreadScratch()
# Numbers [N, V] up to which the loss's gradient is made beside the loss and kept, in the hidden states' dtype, for
# backward, which otherwise computes both models' logits again.
KEPT_GRADIENT = 2**26


class TokenLoss(NamedTuple):
    """Per token, float32 [N]: the loss (with gradient), and without gradient the exact reverse KL and both
    entropies in nats. Where rollout tokens were given, also their log q (with gradient) and log p."""

    loss_N: Tensor
    reverse_kl_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    logp_student_N: Tensor | None = None
    logp_teacher_N: Tensor | None = None


def loss_from_logits(
    logits_student_NV: Tensor,
    logits_teacher: Tensor | Callable[[slice], Tensor],
    *,
    divergence: Callable[[Prefixes], Integrand] = reverse_kl,
    vocabulary: SharedVocabulary | None = None,
    chunk_tokens: int = 1024,
    token_N: Tensor | None = None,
    corrected_N: Tensor | None = None,
) -> TokenLoss:
    """The loss of every token from student logits that exist already (in the model's dtype).

    logits_student_NV: divided by the temperature; padding rows of the output layer may still be there.
    logits_teacher: the same for the teacher, [N, rows], or a function that gives them for a slice of tokens,
      for example its output layer. It is asked once per chunk.
    divergence: for example `get_divergence(name).rule(mode, k, params)`.
    vocabulary: cuts and canonicalizes both; None if both have one vocabulary of one size.
    token_N, corrected_N: the rollout tokens, and which of them are corrections, for the divergences that ask.

    The gradient is made in the forward pass, chunk by chunk, in the student's dtype: as large as the gradient
    autograd would hold, and the teacher's output layer runs once. Hence backward works once. Raises
    ValueError for shapes or chunk_tokens that make no sense.
    """
    teacher = _rows_of(logits_teacher, logits_student_NV.shape[0])
    if logits_student_NV.dim() != 2:
        raise ValueError(f"logits must be [tokens, vocabulary], but are {list(logits_student_NV.shape)}.")
    row_loss = _rows(divergence, vocabulary, token_N, corrected_N, with_token_logp=False)
    with_grad = logits_student_NV.requires_grad and torch.is_grad_enabled()
    loss_N, rest_KN = _Logits.apply(logits_student_NV, teacher, row_loss, 4, chunk_tokens, with_grad)
    return TokenLoss(loss_N, *rest_KN)


def loss_from_layers(
    hidden_student_ND: Tensor,
    weight_student_VD: Tensor,
    hidden_teacher_NE: Tensor,
    weight_teacher_VE: Tensor,
    *,
    bias_student_V: Tensor | None = None,
    bias_teacher_V: Tensor | None = None,
    temperature: float = 1.0,
    divergence: Callable[[Prefixes], Integrand] = reverse_kl,
    vocabulary: SharedVocabulary | None = None,
    chunk_tokens: int = 1024,
    token_N: Tensor | None = None,
    corrected_N: Tensor | None = None,
) -> TokenLoss:
    """The loss of every token through both output layers, whose logits exist for one chunk at a time.

    Like `loss_from_logits`, but nothing of more than KEPT_GRADIENT numbers N x V is kept, in any dtype: backward
    computes each chunk again. Gradients flow to the student's hidden states, weight and bias. Both distributions
    are taken at `temperature`. Products run in the hidden states' dtype, the rest in float32. On a CPU a chunk has
    no more than CPU_CHUNK logits, whatever chunk_tokens allows. With token_N the result has
    those tokens' log-probabilities.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    if hidden_student_ND.shape[0] != hidden_teacher_NE.shape[0]:
        raise ValueError(
            f"student and teacher have {hidden_student_ND.shape[0]} and {hidden_teacher_NE.shape[0]} tokens."
        )
    if vocabulary is not None:
        weight_teacher_VE = weight_teacher_VE[: vocabulary.size]
        bias_teacher_V = None if bias_teacher_V is None else bias_teacher_V[: vocabulary.size]

    def teacher(rows: slice) -> Tensor:
        return _logits(hidden_teacher_NE[rows].detach(), weight_teacher_VE, bias_teacher_V, "teacher")

    row_loss = _rows(divergence, None, token_N, corrected_N, token_N is not None)
    layer = (hidden_student_ND, weight_student_VD, bias_student_V)
    return loss_of_layer(*layer, Way(row_loss, teacher, temperature, vocabulary), chunk_tokens, token_N is not None)


class Way(NamedTuple):
    """How a chunk's loss comes about: `row_loss` of the logits over the shared vocabulary at `temperature`; `teacher`
    gives the raw logits of a chunk, None where the loss does without.
    """

    row_loss: RowLoss
    teacher: Callable[[slice], Tensor] | None
    temperature: float
    vocabulary: SharedVocabulary | None


def loss_of_layer(
    hidden_student_ND: Tensor,
    weight_student_VD: Tensor,
    bias_student_V: Tensor | None,
    way: Way,
    chunk_tokens: int,
    with_token_logp: bool = True,
) -> TokenLoss:
    """A row loss over the student's output layer. Its values are the loss, with_token_logp also log q, both
    differentiable; then reverse KL, the entropies of student and teacher, and with_token_logp log p.
    """
    if way.vocabulary is not None:  # padding rows need no logits
        weight_student_VD = weight_student_VD[: way.vocabulary.size]
        bias_student_V = None if bias_student_V is None else bias_student_V[: way.vocabulary.size]
    layer = (hidden_student_ND, weight_student_VD, bias_student_V)
    if not with_token_logp:
        return TokenLoss(*_Linear.apply(*layer, way, 4, 1, chunk_tokens))
    loss_N, logp_student_N, kl_N, entropy_N, entropy_teacher_N, logp_teacher_N = _Linear.apply(
        *layer, way, 6, 2, chunk_tokens
    )
    return TokenLoss(loss_N, kl_N, entropy_N, entropy_teacher_N, logp_student_N, logp_teacher_N)


def _rows(
    divergence: Callable[[Prefixes], Integrand],
    vocabulary: SharedVocabulary | None,
    token_N: Tensor | None,
    corrected_N: Tensor | None,
    with_token_logp: bool,
) -> RowLoss:
    """The row loss of both public functions: loss, reverse KL, entropies of student and teacher; with_token_logp:
    loss, log q (both differentiable), reverse KL, the entropies, log p."""

    def exact_loss(
        logits_CV: Tensor, teacher_CV: Tensor | None, rows: slice, upstream_JC: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`row_loss` for the reverse KL itself, from logits that are not normalized: the same in fewer sweeps."""
        assert teacher_CV is not None
        student_CV = _shared_logits(logits_CV, vocabulary, "student")
        teacher_CV = _shared_logits(teacher_CV, vocabulary, "teacher")
        _check_shapes(student_CV, teacher_CV)
        exact = exact_rows(student_CV, teacher_CV, _SCRATCH)
        token_C1 = token_N[rows, None] if with_token_logp and token_N is not None else None
        logps = []
        if token_C1 is not None:
            pairs = ((student_CV, exact.student_log_z_C), (teacher_CV, exact.teacher_log_z_C))
            logps = [logits.gather(-1, token_C1).squeeze(-1) - log_z_C for logits, log_z_C in pairs]
        entropies = exact.student_entropy_C, exact.teacher_entropy_C
        values_KC = torch.stack([exact.kl_C, *logps[:1], exact.kl_C, *entropies, *logps[1:]])
        if upstream_JC is None:
            return values_KC, None
        upstream_logp_C = upstream_JC[1] if token_C1 is not None and len(upstream_JC) > 1 else None
        return values_KC, exact_gradient(exact, upstream_JC[0], upstream_logp_C, token_C1)

    def row_loss(
        logits_CV: Tensor, teacher_CV: Tensor | None, rows: slice, upstream_JC: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_CV is not None
        logp_student_CV = _shared_logits(logits_CV, vocabulary, "student").log_softmax(-1)
        logp_teacher_CV = _shared_logits(teacher_CV, vocabulary, "teacher").log_softmax(-1)
        _check_shapes(logp_student_CV, logp_teacher_CV)
        prefixes = Prefixes(
            logp_student_CV,
            logp_teacher_CV,
            token_C=None if token_N is None else token_N[rows],
            corrected_C=None if corrected_N is None else corrected_N[rows],
        )
        integrand = divergence(prefixes)
        loss_C = integrand.value_C
        kl_C = reverse_kl(prefixes).value_C
        grad_CV = None
        if upstream_JC is not None:
            grad_CV = scale_rows(integrand.gradient_CV(prefixes.student_CV), upstream_JC[0])
        del integrand
        logps = []
        if with_token_logp:
            assert token_N is not None
            token_C1 = token_N[rows, None]
            logps = [logp_CV.gather(-1, token_C1).squeeze(-1) for logp_CV in (logp_student_CV, logp_teacher_CV)]
            if grad_CV is not None and upstream_JC is not None and len(upstream_JC) > 1:
                add_logp_gradient(grad_CV, prefixes.student_CV, token_C1, upstream_JC[1, :, None])
        entropies = [prefixes.student_entropy_C, prefixes.teacher_entropy_C]
        return torch.stack([loss_C, *logps[:1], kl_C, *entropies, *logps[1:]]), grad_CV

    return exact_loss if divergence is reverse_kl else row_loss


def _check_shapes(student_CV: Tensor, teacher_CV: Tensor) -> None:
    if student_CV.shape != teacher_CV.shape:
        raise ValueError(
            f"logits differ in shape: {list(student_CV.shape)} and {list(teacher_CV.shape)}; "
            "give the shared vocabulary if only padding differs."
        )


def add_logp_gradient(grad_CV: Tensor, student_CV: Tensor, token_C1: Tensor, upstream_C1: Tensor) -> None:
    """Adds upstream * d log q(token) / d logits, upstream (e_token - q), in place."""
    grad_CV.addcmul_(student_CV, upstream_C1, value=-1).scatter_add_(-1, token_C1, upstream_C1.to(grad_CV.dtype))


def _shared_logits(logits_CV: Tensor, vocabulary: SharedVocabulary | None, role: Role) -> Tensor:
    """Logits over the shared vocabulary in float32 (float64 for float64)."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if vocabulary is None else canonicalize(logits_CV, vocabulary, role)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, name: str) -> Tensor:
    """An output layer's logits, in the hidden states' dtype; on a CPU until the next call of that name."""
    shape = torch.Size((hidden_CD.shape[0], weight_VD.shape[0]))
    with torch.autocast(hidden_CD.device.type, enabled=False), torch.no_grad():
        out_CV = _SCRATCH.empty(name, shape, hidden_CD)
        logits_CV = torch.mm(hidden_CD, weight_VD.to(hidden_CD.dtype).T, out=out_CV)
        return logits_CV if bias_V is None else logits_CV.add_(bias_V.to(hidden_CD.dtype))


def _block_logits(raw_BV: Tensor, way: Way, role: Role) -> Tensor:
    """`_logits` at the temperature and over the shared vocabulary, in float32 at least; may overwrite them."""
    if raw_BV.dtype not in (torch.float32, torch.float64):
        raw_BV = _SCRATCH.empty(f"{role}'s block", raw_BV.shape, raw_BV.new_empty(0, dtype=torch.float32)).copy_(raw_BV)
    if way.temperature != 1:
        raw_BV.div_(way.temperature)
    return raw_BV if way.vocabulary is None else canonicalize(raw_BV, way.vocabulary, role, inplace=True)


def _chunk_loss(logits_CV: Tensor, way: Way, rows: slice, upstream_JC: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The row loss of a chunk, block by block, and its gradient, on a CPU until the next call."""
    teacher_CV = None if way.teacher is None else way.teacher(rows)

    def loss_of(block: slice) -> tuple[Tensor, Tensor | None]:
        return way.row_loss(
            _block_logits(logits_CV[block], way, "student"),
            None if teacher_CV is None else _block_logits(teacher_CV[block], way, "teacher"),
            slice(rows.start + block.start, rows.start + block.stop),
            None if upstream_JC is None else upstream_JC[:, block],
        )

    tokens = len(logits_CV)
    step = most_rows(CPU_BLOCK, logits_CV, tokens)
    if step >= tokens:
        return loss_of(slice(0, tokens))
    grad_CV = None if upstream_JC is None else _SCRATCH.empty("gradient", logits_CV.shape, logits_CV)
    values = []
    for block in _chunks(tokens, step):
        values_KB, grad_BV = loss_of(block)
        values.append(values_KB)
        if grad_CV is not None and grad_BV is not None:
            grad_CV[block] = grad_BV
    return torch.cat(values, -1), grad_CV


def _rows_of(logits: Tensor | Callable[[slice], Tensor], tokens: int) -> Callable[[slice], Tensor]:
    if not isinstance(logits, Tensor):
        return logits
    if logits.dim() != 2 or logits.shape[0] != tokens:
        raise ValueError(f"teacher logits are {list(logits.shape)}, but the student has {tokens} tokens.")
    fixed = logits.detach()
    return lambda rows: fixed[rows]


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, but is {chunk_tokens}.")
    return (slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens))


def scale_rows(grad_NV: Tensor, scale_N: Tensor) -> Tensor:
    """grad * scale in place; rows of scale 0 (padding) are 0 whatever they hold."""
    return grad_NV.mul_(scale_N[:, None]).masked_fill_(scale_N[:, None] == 0, 0)


class _Logits(torch.autograd.Function):
    """A row loss of logits that exist. The rows are independent, so the gradient of any weighting of the rows
    is the stored gradient of each row times its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        teacher: Callable[[slice], Tensor],
        row_loss: RowLoss,
        values: int,
        chunk_tokens: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens = logits_NV.shape[0]
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        value_KN = torch.empty(values, tokens, dtype=dtype, device=logits_NV.device)
        ctx.grad_NV = torch.zeros_like(logits_NV) if with_grad else None
        for rows in _chunks(tokens, chunk_tokens):
            one_1C = value_KN.new_ones(1, rows.stop - rows.start) if with_grad else None
            value_KN[:, rows], grad_CV = row_loss(logits_NV[rows], teacher(rows), rows, one_1C)
            if grad_CV is not None:
                ctx.grad_NV[rows, : grad_CV.shape[-1]] = grad_CV
        loss_N, rest_KN = value_KN[0].clone(), value_KN[1:]
        ctx.mark_non_differentiable(rest_KN)
        return loss_N, rest_KN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_NV is None:
            raise RuntimeError("This loss keeps its gradient for one backward pass; compute the loss again.")
        grad_NV, ctx.grad_NV = scale_rows(ctx.grad_NV, grads[0]), None
        return grad_NV, *[None] * 5


class _Linear(torch.autograd.Function):
    """A row loss of the logits of an output layer, computed chunk by chunk, and again in backward where the gradient of
    its first value has not been kept, or is not all that is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        way: Way,
        values: int,
        differentiable: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.set_materialize_grads(False)
        tokens, size = hidden_ND.shape[0], weight_VD.shape[0]
        ctx.chunk_tokens = chunk_tokens = most_rows(CPU_CHUNK, weight_VD.T, chunk_tokens)
        ctx.way, ctx.differentiable = way, differentiable
        keep = any(ctx.needs_input_grad) and tokens * size <= KEPT_GRADIENT
        ctx.kept_NV = hidden_ND.new_empty(tokens, size) if keep else None
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        value_KN = torch.empty(values, tokens, dtype=dtype, device=hidden_ND.device)
        for rows in _chunks(tokens, chunk_tokens):
            logits_CV = _logits(hidden_ND[rows], weight_VD, bias_V, "student")
            one_1C = value_KN.new_ones(1, rows.stop - rows.start) if keep else None
            value_KN[:, rows], grad_CV = _chunk_loss(logits_CV, way, rows, one_1C)
            if keep:
                ctx.kept_NV[rows] = grad_CV
        columns = [value_N.clone() for value_N in value_KN]
        ctx.mark_non_differentiable(*columns[differentiable:])
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        sums = torch.promote_types(hidden_ND.dtype, torch.float32)  # over chunks, of bfloat16 products
        grad_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=sums) if need_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=sums) if need_bias else None
        zero_N = torch.zeros(len(hidden_ND), dtype=sums, device=hidden_ND.device)
        upstream_JN = [zero_N if grad_N is None else grad_N for grad_N in grads[: ctx.differentiable]]
        upstream_JN = torch.stack(upstream_JN) / ctx.way.temperature
        # None where nobody uses the value; zeros where its weight in the loss is 0. (On a GPU to look is to wait.)
        use_kept = ctx.kept_NV is not None and all(
            grad_N is None or not bool(grad_N.any()) for grad_N in grads[1 : ctx.differentiable]
        )
        for rows in _chunks(len(hidden_ND), ctx.chunk_tokens):
            if use_kept:
                kept_CV = ctx.kept_NV[rows]  # stays as it is, for another backward
                grad_CV = _SCRATCH.empty("gradient", kept_CV.shape, kept_CV).copy_(kept_CV)
                grad_CV = scale_rows(grad_CV, upstream_JN[0, rows])
            else:
                logits_CV = _logits(hidden_ND[rows], weight_VD, bias_V, "student")
                _, made_CV = _chunk_loss(logits_CV, ctx.way, rows, upstream_JN[:, rows])
                assert made_CV is not None
                grad_CV = made_CV.to(hidden_ND.dtype)
            if grad_V is not None:
                grad_V += grad_CV.sum(0, dtype=sums)
            if grad_ND is not None:
                torch.mm(grad_CV, weight_VD.to(hidden_ND.dtype), out=grad_ND[rows])
            if grad_VD is not None and grad_VD.dtype == hidden_ND.dtype:
                grad_VD.addmm_(grad_CV.T, hidden_ND[rows])  # without a second [V, D]
            elif grad_VD is not None:
                grad_VD += grad_CV.T @ hidden_ND[rows]
        grad_weight = None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        grad_bias = None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype)
        return grad_ND, grad_weight, grad_bias, *[None] * 4

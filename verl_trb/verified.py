"""What verification knows of the teacher, kept for the loss: training then reads no teacher (trb.reuse_verification).

To verify its drafts the rollout engine runs the teacher at the prefix of every rollout token. Its last hidden state
there and its output layer, which the training worker has, are all that any loss needs of it: exact over the whole
vocabulary, and E numbers a token instead of V.

The top-k form of reverse KL needs less, log p at the student's k most likely tokens: of it the worker keeps these, and
what is logged besides, as 2k + 3 numbers a token. They are those of the student that made the rollouts, so with several
updates a step the later ones use its choice of k tokens, not their own.

Shapes: N tokens of rollouts, K the student's most likely tokens, V vocabulary, C = 2K + 3 columns, D and E hidden sizes
of student and teacher.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from verl_trb.bits import exp
from verl_trb.chunked_loss import TokenLoss, Way, add_logp_gradient, loss_of_layer, scale_rows
from verl_trb.divergences import Prefixes, reverse_kl, top_reverse_kl
from verl_trb.vocabulary import SharedVocabulary

# Fields of the batch: float32 [response tokens, C], or the teacher's last hidden states [response tokens, E].
VERIFIED, TEACHER_HIDDEN = "verified", "teacher_hidden"
# What a request asks to keep: k, or this for the hidden states.
HIDDEN_STATES = 0


class Verified(NamedTuple):
    """index_NK: int64, the student's most likely tokens, over the shared vocabulary; logp_teacher_NK: log p at them;
    reverse_kl_N, teacher_entropy_N: nats; logp_teacher_N: log p of the rollout token. float32.
    """

    index_NK: Tensor
    logp_teacher_NK: Tensor
    reverse_kl_N: Tensor
    teacher_entropy_N: Tensor
    logp_teacher_N: Tensor

    def packed(self) -> Tensor:
        """[N, C] float32, in which ids up to 2^24 are exact."""
        return torch.cat([self.index_NK.float(), self.logp_teacher_NK, torch.stack(self[2:], dim=-1)], dim=-1)

    @classmethod
    def unpacked(cls, packed_NC: Tensor) -> Self:
        k = (packed_NC.shape[-1] - 3) // 2
        index_NK, logp_NK, rest_N3 = packed_NC.split([k, k, 3], dim=-1)
        return cls(index_NK.long(), logp_NK, *rest_N3.unbind(-1))


def as_bytes(rows_TC: Tensor) -> tuple[str, int, bytes]:
    """dtype, C, and the numbers row after row: vLLM would send a tensor as the parts it is made of."""
    return str(rows_TC.dtype).removeprefix("torch."), rows_TC.shape[1], rows_TC.view(torch.uint8).numpy().tobytes()


def byte_rows(dtype: str, columns: int, numbers: bytes) -> tuple[str, np.ndarray]:
    """dtype, and uint8 [T, bytes of a row]: NumPy has no bfloat16, and Ray carries its arrays without a copy."""
    return dtype, np.frombuffer(numbers, np.uint8).reshape(-1, columns * getattr(torch, dtype).itemsize)


def from_bytes(dtype: str, rows: np.ndarray) -> Tensor:
    """[T, C] of what `byte_rows` gave."""
    return torch.tensor(rows).view(getattr(torch, dtype))


def verified(logp_student_NV: Tensor, logp_teacher_NV: Tensor, token_N: Tensor, k: int) -> Verified:
    """From both models' normalized log-probabilities over the shared vocabulary, and the tokens that were drawn."""
    if logp_student_NV.shape[-1] > 2**24:
        raise ValueError(f"ids of {logp_student_NV.shape[-1]} tokens are not exact in float32.")
    index_NK = logp_student_NV.topk(min(k, logp_student_NV.shape[-1]), dim=-1).indices
    prefixes = Prefixes(logp_student_NV, logp_teacher_NV)
    return Verified(
        index_NK,
        logp_teacher_NV.gather(-1, index_NK),
        reverse_kl(prefixes).value_C,
        prefixes.teacher_entropy_C,
        logp_teacher_NV.gather(-1, token_N[:, None]).squeeze(-1),
    )


def loss_from_verified(
    hidden_student_ND: Tensor,
    weight_student_VD: Tensor,
    known: Verified,
    *,
    token_N: Tensor,
    bias_student_V: Tensor | None = None,
    temperature: float = 1.0,
    vocabulary: SharedVocabulary | None = None,
    chunk_tokens: int = 1024,
) -> TokenLoss:
    """The top-k form of reverse KL (`topk_reverse_kl`) like `loss_from_layers`, on the tokens that `known` names and
    with what it says of the teacher. Reverse KL and the teacher's entropy are those of the rollout.
    """

    def row_loss(
        logits_CV: Tensor, _: Tensor | None, rows: slice, upstream_JC: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        here = Verified(*(column[rows] for column in known))
        logp_CV, token_C1 = logits_CV.log_softmax(-1), token_N[rows, None]
        integrand = top_reverse_kl(logp_CV, here.index_NK, here.logp_teacher_NK)
        student_CV = exp(logp_CV)
        logp_C = logp_CV.gather(-1, token_C1).squeeze(-1)
        entropy_C = torch.special.entr(student_CV).sum(-1)
        monitored = (here.reverse_kl_N, entropy_C, here.teacher_entropy_N, here.logp_teacher_N)
        values_KC = torch.stack([integrand.value_C, logp_C, *monitored])
        if upstream_JC is None:
            return values_KC, None
        grad_CV = scale_rows(integrand.gradient_CV(student_CV), upstream_JC[0])
        if len(upstream_JC) > 1:
            add_logp_gradient(grad_CV, student_CV, token_C1, upstream_JC[1, :, None])
        return values_KC, grad_CV

    layer = hidden_student_ND, weight_student_VD, bias_student_V
    return loss_of_layer(*layer, Way(row_loss, None, temperature, vocabulary), chunk_tokens)

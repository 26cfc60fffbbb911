"""The student's output layer, which can answer with per-token losses instead of logits.

Inside the FSDP forward its weight is whole, so the loss is computed here, chunk by chunk, and no logits tensor
of either model ever exists beyond a chunk. Outside of distillation it is an ordinary `lm_head`.

Shapes: B x T the layout verl gives the model (padded, or 1 x all tokens), N selected tokens, V vocabulary,
D and E hidden sizes of student and teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from verl_trb.chunked_loss import TokenLoss, loss_from_layers
from verl_trb.divergences import Integrand, Prefixes
from verl_trb.verified import Verified, loss_from_verified
from verl_trb.vocabulary import SharedVocabulary

# What takes the place of the logits' last dimension. `loss` and `log_probs` carry gradients.
COLUMNS = ("loss", "log_probs", "reverse_kl", "student_entropy", "teacher_entropy", "teacher_log_probs")


@dataclass
class TokenLossRequest:
    """Ask the output layer for the columns at the tokens that predict a response token.

    select_BT: bool, those tokens; label_BT: the token each of them predicts; corrected_BT: bool, where the predicted
    token is a correction, if that is known. Of the teacher either hidden_BTE, its last hidden states of the same input,
    and weight_VE, bias_V, its whole output layer; or verified_BTC, what verification kept of it (verified.py).
    """

    select_BT: Tensor
    label_BT: Tensor
    vocabulary: SharedVocabulary
    divergence: Callable[[Prefixes], Integrand]
    chunk_tokens: int
    temperature: float
    corrected_BT: Tensor | None = None
    hidden_BTE: Tensor | None = None
    weight_VE: Tensor | None = None
    bias_V: Tensor | None = None
    verified_BTC: Tensor | None = None


class SharedLinear(nn.Linear):
    """A linear layer that stands in for another and has its parameters."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """A head that shares `linear`'s parameters (also where they are tied to the embedding)."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head


class DistillationHead(SharedLinear):
    """`lm_head` with the same weight and name: checkpoints and weight syncs see no difference."""

    request: TokenLossRequest | None = None
    vocabulary: SharedVocabulary | None = None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]; with a request [B, T, len(COLUMNS)] in float32, 0 at tokens not selected."""
        if self.request is None:
            logits_BTV = super().forward(hidden_BTD)
            return logits_BTV if self.vocabulary is None else mask_unshared(logits_BTV, self.vocabulary)
        ask = self.request
        losses = self._losses(hidden_BTD[ask.select_BT], ask)
        assert losses.logp_student_N is not None and losses.logp_teacher_N is not None  # token_N was given
        columns_NK = torch.stack(
            [
                losses.loss_N,
                losses.logp_student_N,
                losses.reverse_kl_N,
                losses.student_entropy_N,
                losses.teacher_entropy_N,
                losses.logp_teacher_N,
            ],
            dim=-1,
        )
        columns_BTK = columns_NK.new_zeros(*hidden_BTD.shape[:2], len(COLUMNS))
        return columns_BTK.masked_scatter(ask.select_BT.unsqueeze(-1).expand_as(columns_BTK), columns_NK)

    def _losses(self, hidden_ND: Tensor, ask: TokenLossRequest) -> TokenLoss:
        shared: dict[str, Any] = {
            "bias_student_V": self.bias,
            "temperature": ask.temperature,
            "vocabulary": ask.vocabulary,
            "chunk_tokens": ask.chunk_tokens,
            "token_N": ask.label_BT[ask.select_BT],
        }
        if ask.verified_BTC is not None:
            known = Verified.unpacked(ask.verified_BTC[ask.select_BT])
            return loss_from_verified(hidden_ND, self.weight, known, **shared)
        assert ask.hidden_BTE is not None and ask.weight_VE is not None
        return loss_from_layers(
            hidden_ND,
            self.weight,
            ask.hidden_BTE[ask.select_BT],
            ask.weight_VE,
            bias_teacher_V=ask.bias_V,
            divergence=ask.divergence,
            corrected_N=None if ask.corrected_BT is None else ask.corrected_BT[ask.select_BT],
            **shared,
        )


def mask_unshared(logits_BTV: Tensor, vocabulary: SharedVocabulary) -> Tensor:
    """In place, next to no logit for what the rollout engine never draws: without it log-probabilities of plain passes
    would not be those of the rollouts, and importance weights not 1 on the student's own.

    A finite number, because verl's entropy multiplies it with its probability 0.
    """
    least = torch.finfo(logits_BTV.dtype).min / 1000
    logits_BTV[..., list(vocabulary.masked)] = least
    logits_BTV[..., vocabulary.size :] = least
    return logits_BTV


class HiddenStatesHead(SharedLinear):
    """The teacher's `lm_head`: keeps its weight and passes the hidden states on."""

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        return hidden_BTE

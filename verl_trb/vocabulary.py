"""One vocabulary for two models: checks, and the end of a text as one shared event.

Student and teacher must map every token to the same id. Their output layers may have more rows than the
tokenizer has tokens (padding, often of different size): both are cut to the tokenizer's size V. They may end
a text with different tokens (Qwen3: base <|endoftext|>, instruct <|im_end|>): the teacher's mass on its EOS
moves to the student's EOS, the duplicate coordinate is masked in both, and the student's EOS is what is
emitted. Without that a base student never learns to stop (arXiv 2605.31159, EOS canonicalization).

The same `canonicalize` serves sampling and loss, so that pi_S and pi_T mean the same in both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class SharedVocabulary:
    """What sampling and loss need to know of the two tokenizers.

    size: V, both models' logits are cut to it; student_eos, teacher_eos: ids that end a text, the student's
    is the one that is emitted; masked: ids with probability 0 in both models; marker: one of `masked`, which
    the rollout engine may emit to say "stopped for a reason of the engine's".
    """

    size: int
    student_eos: int
    teacher_eos: int
    masked: tuple[int, ...]
    marker: int

    def __post_init__(self) -> None:
        ids = {"student_eos": self.student_eos, "teacher_eos": self.teacher_eos, "marker": self.marker}
        for name, token in ids.items():
            if not 0 <= token < self.size:
                raise ValueError(f"{name} is id {token}, outside the vocabulary of {self.size} ids.")
        if not all(0 <= token < self.size for token in self.masked):
            raise ValueError(f"masked ids must lie in [0, {self.size}), but are {list(self.masked)[:5]}.")
        if self.student_eos in self.masked:
            raise ValueError(f"the student's EOS, id {self.student_eos}, must not be masked: no text could end.")
        if self.marker not in self.masked:
            raise ValueError(f"the marker, id {self.marker}, must be masked, or a model could emit it.")
        if self.teacher_eos != self.student_eos and self.teacher_eos not in self.masked:
            raise ValueError(f"the teacher's EOS, id {self.teacher_eos}, is a duplicate and must be masked.")


def share_vocabulary(
    student_ids: Mapping[str, int],
    teacher_ids: Mapping[str, int],
    *,
    student_eos: int,
    teacher_eos: int,
    student_rows: int,
    teacher_rows: int,
    spare_ids: Iterable[int] = (),
) -> SharedVocabulary:
    """The shared vocabulary of two token -> id maps.

    student_rows, teacher_rows: rows of the models' output layers (config.vocab_size), padding included.
    spare_ids: ids of tokens no answer needs, best first; see `choose_marker`.

    Masked are the teacher's EOS if it differs from the student's, ids below V that no token has, and the
    marker. Raises ValueError if the maps differ (naming the first five tokens that do), if a model has fewer
    rows than the tokenizer has ids, if an EOS is not in the vocabulary, or if there is nothing to use as a
    marker.
    """
    _check_same(student_ids, teacher_ids)
    size = 1 + max(student_ids.values(), default=-1)
    for role, rows in (("student", student_rows), ("teacher", teacher_rows)):
        if rows < size:
            raise ValueError(
                f"The {role} model has {rows} output rows, but its tokenizer has {size} ids; "
                "is this the tokenizer the model was trained with?"
            )
    for role, eos in (("student", student_eos), ("teacher", teacher_eos)):
        if not 0 <= eos < size:
            raise ValueError(f"The {role}'s EOS is id {eos}, outside its vocabulary of {size} ids.")
    masked = set(range(size)) - set(student_ids.values())
    if teacher_eos != student_eos:
        masked.add(teacher_eos)
    marker = choose_marker(student_eos, teacher_eos, sorted(masked), spare_ids)
    return SharedVocabulary(size, student_eos, teacher_eos, tuple(sorted(masked | {marker})), marker)


def from_tokenizers(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_rows: int,
    teacher_rows: int,
    student_eos: int | None = None,
    teacher_eos: int | None = None,
) -> SharedVocabulary:
    """`share_vocabulary` for two Hugging Face tokenizers.

    student_eos, teacher_eos: override the tokenizers' own eos_token_id (some ship a wrong one).
    Spare ids for the marker are, in this order, the student tokenizer's pad and unk token, tokens it calls
    reserved or unused, and its bos token. Raises ValueError as `share_vocabulary`, or if an EOS is unknown.
    """
    student_eos = student_tokenizer.eos_token_id if student_eos is None else student_eos
    teacher_eos = teacher_tokenizer.eos_token_id if teacher_eos is None else teacher_eos
    for role, eos in (("student", student_eos), ("teacher", teacher_eos)):
        if eos is None:
            raise ValueError(f"The {role}'s tokenizer has no EOS token; set one, or no text can end.")
    ids = student_tokenizer.get_vocab()
    idle = [token for text, token in ids.items() if "reserved" in text.lower() or "<unused" in text.lower()]
    special = [student_tokenizer.pad_token_id, student_tokenizer.unk_token_id]
    reserved = sorted(set(idle) & set(student_tokenizer.all_special_ids))
    spare = [*special, *reserved, student_tokenizer.bos_token_id]
    return share_vocabulary(
        ids,
        teacher_tokenizer.get_vocab(),
        student_eos=student_eos,
        teacher_eos=teacher_eos,
        student_rows=student_rows,
        teacher_rows=teacher_rows,
        spare_ids=[token for token in spare if token is not None],
    )


def choose_marker(student_eos: int, teacher_eos: int, masked: Iterable[int] = (), spare_ids: Iterable[int] = ()) -> int:
    """An id below the vocabulary size that can be masked in both models without loss.

    The teacher's EOS where it duplicates the student's; else an id that is masked anyway; else the first
    spare id (a pad token, say: no answer contains it) that is not an EOS. Raises ValueError if there is none.
    """
    if teacher_eos != student_eos:
        return teacher_eos
    for token in (*masked, *spare_ids):
        if token not in (student_eos, teacher_eos):
            return token
    raise ValueError(
        "The tokenizer has no id to spare for the rollout engine's stop marker; add a pad token that differs "
        "from the EOS token."
    )


def canonicalize(logits: Tensor, vocabulary: SharedVocabulary, role: Role, *, inplace: bool = False) -> Tensor:
    """A model's logits (or log-probabilities) over the shared vocabulary: [..., rows] -> [..., V].

    Padding rows are cut and `vocabulary.masked` is -inf for both roles; the teacher's EOS is first added to
    the student's (logaddexp, in float32 at least). The result is not normalized: softmax it. Divide by the
    temperature before, so that it is the probabilities of the two EOS that add up. Differentiable, and a new
    tensor; with `inplace` neither: the logits are overwritten.

    Raises ValueError if there are fewer logits than shared ids, or for an unknown role.
    """
    if logits.shape[-1] < vocabulary.size:
        raise ValueError(f"The {role} has {logits.shape[-1]} logits, fewer than {vocabulary.size} shared ids.")
    if role not in ("student", "teacher"):
        raise ValueError(f"role must be 'student' or 'teacher', but is {role!r}.")
    logits = logits[..., : vocabulary.size]
    own, merged = vocabulary.student_eos, None
    if role == "teacher" and vocabulary.teacher_eos != own:
        accurate = logits[..., [own, vocabulary.teacher_eos]].to(torch.promote_types(logits.dtype, torch.float32))
        merged = torch.logaddexp(accurate[..., 0], accurate[..., 1]).to(logits.dtype)
    masked = _masked_ids(vocabulary, logits.device)
    shared = logits.index_fill_(-1, masked, -math.inf) if inplace else logits.index_fill(-1, masked, -math.inf)
    if merged is not None:
        shared[..., own] = merged
    return shared


@functools.lru_cache(maxsize=16)
def _masked_ids(vocabulary: SharedVocabulary, device: torch.device) -> Tensor:
    # Perhaps called first by an engine in inference mode, and then by a loss that saves it for backward.
    with torch.inference_mode(False):
        return torch.tensor(vocabulary.masked, dtype=torch.long, device=device)


def _check_same(student_ids: Mapping[str, int], teacher_ids: Mapping[str, int]) -> None:
    """ValueError naming the first five tokens, by id, that the maps disagree on."""
    differing = [
        token for token in student_ids.keys() | teacher_ids.keys() if student_ids.get(token) != teacher_ids.get(token)
    ]
    if differing:
        everywhere = {**teacher_ids, **student_ids}
        first = sorted(differing, key=lambda token: (everywhere[token], token))[:5]
        named = ", ".join(
            f"{token!r} (student {student_ids.get(token, 'none')}, teacher {teacher_ids.get(token, 'none')})"
            for token in first
        )
        raise ValueError(
            f"Student and teacher need the same token -> id map, but {len(differing)} tokens differ: {named}"
            f"{', ...' if len(differing) > 5 else ''}."
        )

"""verl's FSDP engine with the teacher beside the student, for micro-batches that ask for token losses.

Registered with verl for the vendors "nvidia" and "cpu", whose entries verl prefers over its own.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_trb.divergences import SAMPLED, get_divergence, reverse_kl
from verl_trb.timeline import Spans
from verl_trb.training.head import COLUMNS, DistillationHead, TokenLossRequest
from verl_trb.training.lora import merged
from verl_trb.training.loss import objective_of
from verl_trb.training.teacher import Teacher
from verl_trb.verified import TEACHER_HIDDEN, VERIFIED
from verl_trb.vocabulary import SharedVocabulary

# The batch's field, 1 where the rollout token replaced a rejected draft of the student's.
CORRECTED = "corrected"


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor="nvidia")
@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu", vendor="cpu")
class DistillationEngine(FSDPEngineWithLMHead):
    """The student's engine. For batches without an objective that distills it is verl's own."""

    teacher: Teacher | None = None
    engine_config: Any  # set by verl

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spans = Spans("worker")
        self.student_since: float | None = None

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        self.head = DistillationHead.from_linear(module.get_output_embeddings())
        module.set_output_embeddings(self.head)
        return module

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        if get_device_name() != "cpu" or not self.engine_config.forward_only:
            return super()._build_fsdp_module(module)
        # A reference model. verl would offload it to pinned memory, which needs an accelerator.
        config: Any = self.engine_config
        self.engine_config = dataclasses.replace(config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config

    def _merged_lora_per_tensor_param(self) -> Iterator[tuple[str, Tensor]]:
        """The student with its adapters merged, parameter by parameter: what a weight sync sends.

        verl's merges in place, restores the weights from a copy, and rounds all to bfloat16, whatever the engine has.
        """
        device = get_device_id()

        def whole(parameter: Tensor) -> Tensor:
            if isinstance(parameter, DTensor):
                moved: Any = parameter.to(device)
                return moved.full_tensor()
            return parameter.detach().clone()

        yield from merged(self.module.state_dict(), self.model_config.lora_alpha / self.model_config.lora_rank, whole)

    def attach_teacher(self, teacher: Teacher, vocabulary: SharedVocabulary, topk: int, chunk_tokens: int) -> None:
        """topk: k of the top-k losses; chunk_tokens: tokens whose logits exist at one time."""
        self.teacher, self.vocabulary, self.topk, self.chunk_tokens = teacher, vocabulary, topk, chunk_tokens
        self.head.vocabulary = vocabulary

    def forward_backward_batch(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward_backward_batch(*args, **kwargs)
        finally:
            self._student_until_now()

    def optimizer_step(self) -> Any:
        with self.spans.during("optimizer"):
            return super().optimizer_step()

    def _student_until_now(self) -> None:
        """The student's forward and backward pass of a micro-batch end where the next one's begin."""
        now = time.time()
        if self.student_since is not None:
            self.spans.add("student", self.student_since, now)
        self.student_since = None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool):
        self._student_until_now()
        self.student_since = time.time()
        objective = objective_of(micro_batch)
        if objective is None or not objective.distills:
            return super().forward_step(micro_batch, loss_function, forward_only)
        assert self.teacher is not None, "token losses were asked for before the teacher was attached"
        divergence = reverse_kl  # of a single-sample loss only the log-probabilities are used
        if objective.mode != SAMPLED:
            divergence = get_divergence(objective.divergence).rule(objective.mode, self.topk, objective.params)
        micro_batch = micro_batch.to(get_device_id())
        model_inputs, _ = self.prepare_model_inputs(micro_batch=micro_batch)
        input_ids_BT = model_inputs["input_ids"]
        teacher: dict[str, Tensor | None] = {}
        if VERIFIED in micro_batch:
            teacher["verified_BTC"] = at_predictions(micro_batch, VERIFIED, input_ids_BT)
        elif TEACHER_HIDDEN in micro_batch:
            weight_VE, bias_V = self.teacher.output_layer()
            hidden_BTE = at_predictions(micro_batch, TEACHER_HIDDEN, input_ids_BT).to(weight_VE.dtype)
            teacher |= {"hidden_BTE": hidden_BTE, "weight_VE": weight_VE, "bias_V": bias_V}
        else:
            with self.spans.during("teacher"):
                teacher["hidden_BTE"] = self.teacher.hidden_states(**model_inputs)
                teacher["weight_VE"], teacher["bias_V"] = self.teacher.output_layer()
        self.student_since = time.time()
        select_BT, label_BT = prediction_layout(micro_batch, input_ids_BT)
        corrected = CORRECTED in micro_batch
        self.head.request = TokenLossRequest(
            select_BT=select_BT,
            label_BT=label_BT,
            vocabulary=self.vocabulary,
            divergence=divergence,
            chunk_tokens=self.chunk_tokens,
            temperature=float(tu.get_non_tensor_data(data=micro_batch, key="temperature", default=1.0)),
            corrected_BT=at_predictions(micro_batch, CORRECTED, input_ids_BT).bool() if corrected else None,
            **teacher,
        )
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self.head.request = None

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ):
        """One nested tensor [B, prompt + response] per column of COLUMNS."""
        if self.head.request is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        columns_BTK = output.logits
        real_BT = _real_tokens(offsets, columns_BTK.shape[:2])
        columns_KN = columns_BTK[real_BT].T
        outputs = {
            name: torch.nested.nested_tensor_from_jagged(column_N, offsets)
            for name, column_N in zip(COLUMNS, columns_KN, strict=True)
        }
        outputs["entropy"] = outputs["student_entropy"]  # verl's name for it
        return outputs


def _real_tokens(offsets: Tensor, shape: torch.Size) -> Tensor:
    """Which places of the model's [B, T] input hold a token: all but right padding; all of a packed [1, N]."""
    if shape[0] == 1:
        return torch.arange(shape[1], device=offsets.device).unsqueeze(0) < offsets[-1]
    return torch.arange(shape[1], device=offsets.device) < offsets.diff().unsqueeze(1)


def prediction_layout(micro_batch: TensorDict, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of the model's input predict a response token that is trained on, and which token that is.

    Args:
        micro_batch: verl's, with nested `input_ids`, `responses` and `response_mask`.
        input_ids_BT: what the model is given, right-padded [B, T] or packed [1, N].

    Returns:
        select_BT bool and label_BT int64; the label of a token is its successor in its own sequence.
    """
    label_BT = torch.zeros_like(input_ids_BT)
    real_BT = _real_tokens(micro_batch["input_ids"].offsets(), input_ids_BT.shape)
    label_BT[real_BT] = micro_batch["input_ids"].values().roll(-1)
    return at_predictions(micro_batch, "response_mask", input_ids_BT).bool(), label_BT


def at_predictions(micro_batch: TensorDict, field: str, input_ids_BT: Tensor) -> Tensor:
    """A nested field of response tokens, [length] or [length, C] each, as [B, T] or [B, T, C] of the model's input: at
    the tokens that predict them, 0 elsewhere.
    """
    offsets = micro_batch["input_ids"].offsets()
    rows = micro_batch[field].unbind()
    value_N = rows[0].new_zeros(int(offsets[-1]), *rows[0].shape[1:])
    for end, row in zip(offsets[1:].tolist(), rows, strict=True):
        # The response is the sequence's tail; its j-th token is predicted one place before it stands.
        value_N[end - 1 - len(row) : end - 1] = row
    value_BT = value_N.new_zeros(*input_ids_BT.shape, *value_N.shape[1:])
    value_BT[_real_tokens(offsets, input_ids_BT.shape)] = value_N
    return value_BT

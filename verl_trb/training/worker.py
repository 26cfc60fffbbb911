"""verl's hybrid worker with the frozen teacher next to the student's FSDP engine and its vLLM rollout."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.engine_workers import ActorRolloutRefWorker

import verl_trb.rollout.server  # noqa: F401  registers the rollout engine with verl in this process
import verl_trb.training.engine  # noqa: F401  registers the training engine
from verl_trb.schedules import warmup_factor
from verl_trb.timeline import Span
from verl_trb.training.export import save_student, source_dtype
from verl_trb.training.loss import DistillationLoss
from verl_trb.training.teacher import Teacher
from verl_trb.vocabulary import from_tokenizers


class DistillationWorker(ActorRolloutRefWorker):
    """`config.rollout.custom.trb` carries the resolved `trb` section of the run's config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if get_device_name() == "cpu":
            # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses; it skips what is initialized already.
            initialize_global_process_group_ray(backend="gloo")
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        super().init_model()
        trb = OmegaConf.to_container(OmegaConf.create(self.config.rollout.custom["trb"]))
        engine = self.actor.engine
        model_config = engine.model_config
        path = trb["teacher"]["path"]
        teacher = Teacher(
            path,
            dtype=trb["teacher"]["dtype"],
            attn_implementation=model_config.hf_config._attn_implementation,
            use_remove_padding=model_config.use_remove_padding,
            trust_remote_code=model_config.trust_remote_code,
            offload=trb["teacher"]["offload"],
            engine_config=engine.engine_config,
            device_mesh=engine.device_mesh,
        )
        vocabulary = from_tokenizers(
            model_config.tokenizer,
            hf_tokenizer(path, trust_remote_code=model_config.trust_remote_code),
            student_rows=model_config.hf_config.vocab_size,
            teacher_rows=teacher.module.config.vocab_size,
        )
        engine.attach_teacher(teacher, vocabulary, trb["topk"], trb["loss_chunk_tokens"])
        if trb["lr_warmup"] == "cosine":
            # verl's configuration has no such shape. In place: the checkpoint manager holds the scheduler too.
            steps = engine.optimizer_config.lr_warmup_steps
            shape = partial(warmup_factor, warmup_steps=steps, shape="cosine")
            engine.lr_scheduler.lr_lambdas = [shape for _ in engine.lr_scheduler.lr_lambdas]
        self.actor.set_loss_fn(DistillationLoss(self.loss_fn.keywords["config"]))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_spans(self) -> list[Span]:
        """When the teacher, the student and the optimizer ran since the last call."""
        return self.actor.engine.spans.take()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_student(self, folder: str) -> None:
        """Write the student as a Hugging Face folder, in the dtype it came in, with adapters merged."""
        engine = self.actor.engine
        if engine.model_config.lora_rank:
            state: dict[str, Any] = {name: value.cpu() for name, value in engine.get_per_tensor_param()[0]}
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(engine.module, options=options)
        if torch.distributed.get_rank() == 0:
            model = engine.model_config
            dtype = source_dtype(Path(model.local_path))
            save_student(Path(folder), state, model.hf_config, dtype, model.tokenizer, model.generation_config)
        torch.distributed.barrier()

"""A side of bench_steps.py: verl's own on-policy distillation (k3, a vLLM of its own for the teacher) on a CPU.

    python scripts/verl_opd.py OVERRIDE...    # of verl's ppo_trainer

verl's main_ppo with verl's own trainer, rollouts and loss. From verl_trb come the platform, which verl loads by itself,
and what it needs to run there: recipes/_cpu.yaml, gloo, verl's FSDP engine registered for a CPU, and a weight sync that
vLLM's packed CPU layers survive.
BENCH_POLL: seconds between two looks of verl's trainer at finished rollouts, 2 where unset.
"""

import functools
import os
from pathlib import Path

import hydra
import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

CPU = Path(__file__).parents[1] / "recipes" / "_cpu.yaml"


class WorkerExtension(vLLMColocateWorkerExtension):
    """A weight sync through vLLM's layerwise reload, as in verl_trb/rollout/worker_extension.py."""

    def _iter_all_models_with_config(self):
        return iter(())

    def update_weights_from_ipc(self, *args, **kwargs):
        from verl_trb.rollout.cpu_reload import layerwise_reload

        with layerwise_reload(self.model_runner.model, self.model_runner.model_config):
            super().update_weights_from_ipc(*args, **kwargs)

    def _update_weights(self, weights, *args, **kwargs):
        super()._update_weights([(name, tensor.clone()) for name, tensor in weights], *args, **kwargs)


class GlooWorker(ActorRolloutRefWorker):
    def __init__(self, *args, **kwargs):
        initialize_global_process_group_ray(backend="gloo")  # as in verl_trb/training/worker.py
        cpu = EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu", vendor="cpu")
        cpu(FSDPEngineWithLMHead)
        super().__init__(*args, **kwargs)


class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    def run(self, config: DictConfig) -> None:
        import verl_opd
        from verl.trainer.ppo.v1 import trainer_base

        trainer_base.ActorRolloutRefWorker = verl_opd.GlooWorker
        if poll := os.environ.get("BENCH_POLL"):
            from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

            ReplayBuffer.__init__ = functools.partialmethod(ReplayBuffer.__init__, poll_interval=float(poll))
        super().run(config)


def compute_score(*args, **kwargs) -> float:
    """The reward of every rollout: nothing here is about rewards."""
    return 0.0


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base="1.3")
def main(config: DictConfig) -> None:
    cpu = OmegaConf.load(CPU)
    del cpu["trb"]
    with open_dict(config):
        merged = OmegaConf.merge(config, cpu, OmegaConf.from_dotlist(list(hydra_overrides())))
    run_ppo(merged, task_runner_class=ray.remote(Runner))


def hydra_overrides() -> list[str]:
    """The command's, which come last."""
    from hydra.core.hydra_config import HydraConfig

    return [item.lstrip("+") for item in HydraConfig.get().overrides.task]


if __name__ == "__main__":
    main()

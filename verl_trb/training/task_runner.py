"""The Ray actor that runs the trainer, as verl's TaskRunner does, and keeps the events the driver shows."""

import contextlib
import os
import traceback
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf


@ray.remote(num_cpus=1)
class DistillationTaskRunner:
    """`run` trains; `events` answers meanwhile (the actor is started with two threads)."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._forgotten = 0

    def events(self, start: int) -> list[dict[str, Any]]:
        """The events from number `start` on; the ones before have arrived, and are forgotten."""
        arrived = max(start - self._forgotten, 0)
        del self._events[:arrived]
        self._forgotten += arrived
        return self._events[:]

    def run(self, config: DictConfig, restarts: int = 0) -> None:
        """Trains. Raises RunError, one sentence; ComponentLost where new processes can go on."""
        self._events.append({"kind": "stage", "text": "importing verl and vLLM"})
        import transfer_queue as tq
        from verl.utils.logging_utils import configure_verl_logging

        from verl_trb.faults import explain
        from verl_trb.rewards.function import limit
        from verl_trb.training.agent_loop import DistillationAgentLoopManager
        from verl_trb.training.trainer import DistillationTrainer

        configure_verl_logging()
        # Whatever else trainer.logger names writes beside our own files.
        os.environ.setdefault("TENSORBOARD_DIR", f"{config.trb.run_dir}/tensorboard")
        os.environ.setdefault("WANDB_DIR", config.trb.run_dir)
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        limit(config)
        config.transfer_queue.enable = True
        tq.init(config.transfer_queue)
        trainer: Any = None
        try:
            trainer = DistillationTrainer(config, self._events.append, restarts)
            trainer.init()
            agent_loops = DistillationAgentLoopManager.create(
                config=config,
                llm_client=trainer.get_llm_client(),
                teacher_client=None,
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
            trainer.fit(agent_loops)
            self._events.append({"kind": "stage", "text": "exporting the student"})
            folder = trainer.export_student()
            self._events.append({"kind": "exported", "path": str(folder)})
        except Exception as error:
            traceback.print_exc()  # into the logs; the driver shows the sentence
            raise explain(error, trainer.doing if trainer else "the start") from None
        finally:
            with contextlib.suppress(Exception):  # where a process has died, these fail too
                if getattr(trainer, "logger", None) is not None:
                    trainer.logger.finish(exit_code=0)
                tq.close()

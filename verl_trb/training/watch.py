"""What the run is doing right now, said to the driver and in status.json, and whether those it waits for still live.

verl's trainer waits for its rollouts in a polling loop that looks at their states only: a rollout worker that has died
leaves it waiting for ever. Here the loop also asks the workers what they wait for. The driver's watchdog (launch.py)
stops a run whose last word is older than trb.stall_seconds, and says what it was.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

STATUS = "status.json"
ASK_SECONDS = 1.0


class WatchedTrainer(PPOTrainerSync):
    """`emit` receives what is to be shown; `doing` is the present activity in words."""

    emit: Callable[[dict[str, Any]], None]
    run_dir: Path
    doing = "starting"
    _asked = 0.0
    _ended: list[Any] | None = None  # what the rollout workers answer when their rollouts have ended

    def watch_servers(self, servers: list[Any]) -> None:
        """From here on the driver hears of a rollout engine that ends, whatever this process waits for then: verl sends
        weights through a socket on which it would wait for an engine that is gone until the driver's watchdog ends it.
        """
        ended = [server.engine_ended.remote() for server in servers]

        def watch() -> None:
            ray.wait(ended)
            text = f"the rollout engine's process ended during {self.doing} (its output is in logs/)"
            self.emit({"kind": "lost", "text": text})

        threading.Thread(target=watch, daemon=True).start()

    def now(self, doing: str, detail: str = "") -> None:
        """Says what the run does from here on. `detail` says how far it is."""
        self.doing = doing
        self.emit({"kind": "doing", "text": f"{doing}: {detail}" if detail else doing})
        status = {"step": getattr(self, "global_steps", 0), "doing": doing, "detail": detail, "since": time.time()}
        part = self.run_dir / f"{STATUS}.partial"
        try:
            part.write_text(json.dumps(status))
            os.replace(part, self.run_dir / STATUS)
        except OSError:  # it only informs; what must be written says by itself when the disk is full
            pass

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = 0.002  # seconds; verl's default of 2 is an argument of the class, not of the config
        # verl chooses the class itself, and its loop has no hook.
        buffer._wait_for_next_poll = partial(self._wait, buffer, buffer._wait_for_next_poll)
        return buffer

    def _wait(self, buffer: Any, wait: Callable[..., float], partition: str, *args: Any) -> float:
        """One turn of verl's polling loop. Raises Ray's error if a rollout worker has died."""
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            workers = self.agent_loop_manager.agent_loop_workers
            try:
                counts = ray.get([worker.waiting.remote() for worker in workers], timeout=10)
                waiting: Counter[str] = sum(map(Counter, counts), Counter())
            except ray.exceptions.GetTimeoutError:
                waiting = Counter({"a rollout worker that does not answer": 1})
            done = len(buffer.finished_keys[partition]) + len(buffer.failure_keys[partition])
            open_ = len(buffer.pending_keys[partition]) + len(buffer.running_keys[partition])
            whom = ", ".join(f"{what} ({count} rollouts)" for what, count in sorted(waiting.items()))
            detail = f"{done} of {done + open_} prompts done" + (f", waiting for {whom}" if whom else "")
            if (partition, detail) != getattr(self, "_said", None):
                self._said = (partition, detail)
                self.now(self.doing, detail)
        self._until_ended()
        return wait(partition, *args)

    def _until_ended(self) -> None:
        """At most until it is time to ask again: verl's loop would ask TransferQueue for news all the time."""
        if self._ended is None:
            self._ended = [worker.rollouts_ended.remote() for worker in self.agent_loop_manager.agent_loop_workers]
        ready, _ = ray.wait(self._ended, num_returns=len(self._ended), timeout=ASK_SECONDS)
        if len(ready) == len(self._ended):
            self._ended = None

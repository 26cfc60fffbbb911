"""A few rollouts of a run for its report: at a few steps, for the same validation prompts each time.

They are drawn by the step's own engine and weights, before its rollouts: by the student, and where the step is guided
by the rollout policy too. None of them is trained on or counted in a metric.
"""

import json
from pathlib import Path
from typing import Any

import ray

from verl_trb.guidance import guidance, last_guided_step, step_policy
from verl_trb.policies import STUDENT

SAMPLES = "samples.jsonl"
MOST_TOKENS = 512  # of a sample: enough to read


def sample_steps(last_guided: int | None, total_steps: int) -> set[int]:
    """The first step, the middle of the guided ones, the last of them, and the last of the run.

    last_guided: the step after which rollouts are the student's own, None for never.
    """
    end = total_steps if last_guided is None else min(last_guided, total_steps)
    return {1, (1 + end) // 2, end, total_steps}


class SampleRecorder:
    """Writes samples.jsonl (report/samples.py reads it)."""

    def __init__(self, config: Any, tokenizer: Any, rows: Any, total_steps: int) -> None:
        """rows: verl's validation data set, of which the first trb.sample_prompts are taken."""
        self.config, self.tokenizer = config, tokenizer
        self.file = Path(config.trb.run_dir) / SAMPLES
        self.steps = sample_steps(last_guided_step(config.trb), total_steps)
        options = config.data.get("apply_chat_template_kwargs") or {}
        messages = [rows[i]["raw_prompt"] for i in range(min(config.trb.sample_prompts, len(rows)))]
        self.prompts = [
            tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False, **options)
            for prompt in messages
        ]

    def due(self, step: int) -> bool:
        return bool(self.prompts) and step in self.steps

    def record(self, step: int, server: Any) -> None:
        """Draws and writes the samples of a step. server: handle of a rollout server (rollout/server.py)."""
        params = guidance(self.config.trb, step)
        guided = [] if params is None else [(step_policy(self.config.trb, step), params)]
        ids = self.tokenizer(self.prompts, add_special_tokens=False)["input_ids"]
        limit = min(MOST_TOKENS, self.config.data.max_response_length)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        traces = ray.get(server.sample_rollouts.remote(ids, [(STUDENT, None), *guided], temperature, limit))
        with open(self.file, "a", encoding="utf-8") as file:
            for trace in traces:
                file.write(json.dumps(self._line(step, trace), ensure_ascii=False) + "\n")

    def _line(self, step: int, trace: dict[str, Any]) -> dict[str, Any]:
        def text(token: int) -> str:
            return self.tokenizer.decode([token], skip_special_tokens=False)

        tokens, drafts = trace["tokens"], zip(trace["drafts"], trace["corrected"], strict=True)
        return {
            "step": step,
            "prompt": self.prompts[trace["prompt"]],
            "policy": trace["policy"],
            "tokens": [text(token) for token in tokens],
            "corrected": trace["corrected"],
            "drafts": [text(draft) if corrected else None for draft, corrected in drafts],
            "logp_student": [round(value, 4) for value in trace["logp_student"]],
            "log_mu": [round(value, 4) for value in trace["log_mu"]],
            "finished": trace["finished"],
        }

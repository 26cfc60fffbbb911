"""A side of bench_steps.py: TRL's GKDTrainer, one process, `lmbda=1, beta=1`: student rollouts, exact reverse KL.

python scripts/trl_gkd.py SETTINGS.json    # prints a line of JSON with the seconds of every step
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main(settings: dict) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=settings["dtype"], attn_implementation="sdpa")
        for name in ("student", "teacher")
    )
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": " w4"}]}
        for text in settings["prompts"]
    ]
    arguments = GKDConfig(
        output_dir=settings["folder"],
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=settings["response"],
        max_length=settings["prompt"] + settings["response"],
        per_device_train_batch_size=settings["batch"],
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,  # the models are in settings["dtype"] as they are
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    GKDTrainer(
        student,
        teacher,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["student"]),
        callbacks=[clock],
    ).train()
    print("\n" + json.dumps({"seconds": clock.seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

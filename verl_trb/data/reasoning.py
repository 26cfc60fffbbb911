"""Problems of reasoning-gym, made here from a seed and scored by the task's own verifier."""

import difflib
import json
from typing import Any

from verl_trb.data.files import Row
from verl_trb.data.select import Dropped, Kept, Selection
from verl_trb.data.shapes import Example
from verl_trb.errors import UserError
from verl_trb.rewards.judges import make_reasoning_gym_judge


def make_problems(task: str, count: int, seed: int) -> tuple[Selection, list[str]]:
    """`count` different questions of a task, or all it has, with their entries as JSON, which the verifier needs.

    Raises UserError for an unknown task, or when reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("The package reasoning-gym is missing: pip install reasoning-gym.") from None
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(DATASETS))}."
        raise UserError(f"reasoning-gym has no task {task!r}; {advice}")
    judge = make_reasoning_gym_judge()
    chosen, entries, seen = Selection(), [], set()
    # Small problems repeat: at most four times as many are made.
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=4 * count)
    for index in range(4 * count):
        if len(chosen.kept) == count:
            break
        entry: dict[str, Any] = dataset[index]
        row = Row(f"reasoning_gym/{task}", index, {})
        question, answer = str(entry["question"]).strip(), str(entry["answer"])
        chosen.read += 1
        as_json = json.dumps(entry, default=str)
        if question in seen:
            chosen.dropped.append(Dropped(row, "a copy of another question"))
        elif not _accepts(judge, {"task": task, "entry": as_json, "answer": answer}):
            chosen.dropped.append(Dropped(row, "an answer that the task's verifier does not accept", answer[:200]))
        else:
            seen.add(question)
            chosen.kept.append(Kept(row, index, Example(question, answer, f"{task}-{seed}-{index}")))
            entries.append(as_json)
    if not chosen.kept:
        raise UserError(f"The verifier of {task} accepts none of its {chosen.read} answers; choose another task.")
    if len(chosen.kept) < count:
        chosen.notes.append(f"{task} gave {len(chosen.kept)} different usable questions, fewer than {count}")
    return chosen, entries


def _accepts(judge: Any, request: dict[str, Any]) -> bool:
    try:
        return judge(request)
    except Exception:  # a verifier that needs what JSON cannot keep
        return False

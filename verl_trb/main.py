"""The entry point.

    python -m verl_trb.main recipe=quickstart                         # run a recipe of the folder recipes/
    python -m verl_trb.main recipe=quickstart method=skd              # with a method of the folder recipes/methods/
    python -m verl_trb.main recipe=quickstart trb.epsilon=0.02        # override anything, ours or verl's
    python -m verl_trb.main recipe=qwen3_1p7b dry_run=true            # print what would run and what is wrong

Composes and checks the configuration, makes the task's models and data if the recipe asks for them, checks
the machine and the files, and hands over to launch.py. Nothing heavy is imported before the configuration is
right. Exit code 2 with one line `error: ...` for what the user can mend.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.text import Text

from verl_trb import composition
from verl_trb.errors import UserError
from verl_trb.recipe_source import GROUP, METHOD, names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (by default this process's).

    Returns the exit code: 0, 1 failed, 2 refused, 130 Ctrl-C.
    """
    try:
        if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
            print(f"{__doc__.strip()}\n\nRecipes: {', '.join(names(GROUP))}\nMethods: {', '.join(names(METHOD))}")
            return 0
        return composition.run(run, arguments)
    except UserError as error:
        text = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
        Console(stderr=True, soft_wrap=True, highlight=False).print(text)
        return 2
    except KeyboardInterrupt:
        return 130


def run(config: DictConfig) -> int:
    """One run of a composed, checked configuration. Returns its exit code; raises UserError before Ray starts."""
    from verl_trb import compat, preflight

    if config.dry_run:
        from verl_trb import dry_run

        return dry_run.show(config)

    from verl_trb.display import Display
    from verl_trb.prefork import template
    from verl_trb.quiet import quiet
    from verl_trb.run_folder import LOGS, State, open_run

    compat.check_versions()
    preflight.check_run_dir(config)
    new = not Path(config.trb.run_dir).exists()
    logs = Path(config.trb.run_dir) / LOGS
    with ExitStack() as stack:
        screen = stack.enter_context(quiet(logs / "driver.log"))
        display = stack.enter_context(Display(screen, config.trainer.total_training_steps or 0))
        py_executable = None
        if config.trb.prefork:
            variables = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars") or {}
            py_executable = stack.enter_context(template(variables, str(logs / "template.log")))
        try:
            preflight.check_policy(config)
            preflight.check_objective(config)
            display.header(header(config))
            if config.trb.prepare:
                display.stage(f"models and data of {config.trb.prepare}")
                prepare(config, display.stage)
            display.stage("checking models, data and machine")
            preflight.check(config)
        except UserError:
            if new:  # a refused run leaves no folder
                shutil.rmtree(config.trb.run_dir, ignore_errors=True)
            raise
        from verl_trb.launch import completed, launch

        config = completed(config)
        state = open_run(config)
        if state is State.FINISHED:
            display.warning("this run is finished; trainer.resume_mode=disable starts it anew")
        code = 0 if state is State.FINISHED else launch(config, display, py_executable)
        results(config, display, finished=code == 0)
        return code


def results(config: DictConfig, display: Any, finished: bool) -> None:
    """Writes the report of what there is, and for a finished run shows the results and where they are."""
    from verl_trb.gantt import write_gantt
    from verl_trb.report import read_metrics, summary
    from verl_trb.report.page import PAGE, PICTURE, write_report
    from verl_trb.run_folder import METRICS, STUDENT, relatives
    from verl_trb.timeline import read_timeline

    run_dir = Path(config.trb.run_dir)
    if not (run_dir / METRICS).exists():
        return
    if read_timeline(run_dir):
        write_gantt(run_dir)
    write_report(relatives(run_dir), run_dir)
    if not finished:
        return
    files = {"report": PAGE, "picture": PICTURE, "student": STUDENT, "metrics": METRICS}
    places = {name: run_dir / file for name, file in files.items()}
    vanilla = f"python -m verl_trb.main recipe={config.trb.recipe} method=vanilla"
    display.summary(summary(read_metrics(run_dir)), places, "" if config.trb.policy == "student" else vanilla)


def prepare(config: DictConfig, progress: Callable[[str], None]) -> None:
    """Makes (or finds) the models and data of task trb.prepare, and fills in the paths that are null."""
    from verl_trb.tasks.prepare import prepare as prepare_task

    trb = config.trb
    try:
        made = prepare_task(trb.prepare, trb.cache_dir, progress, task_settings(config))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    with open_dict(config):
        config.actor_rollout_ref.model.path = config.actor_rollout_ref.model.path or str(made.student)
        config.trb.teacher.path = config.trb.teacher.path or str(made.teacher)
        config.data.train_files = config.data.train_files or str(made.train_file)
        config.data.val_files = config.data.val_files or str(made.val_file)


def task_settings(config: DictConfig) -> Any:
    """The settings of task trb.prepare. Raises UserError for an unknown task or unknown parameters of it."""
    from verl_trb.tasks.prepare import settings_of

    trb = config.trb
    try:
        return settings_of(trb.prepare, trb.seed, OmegaConf.to_container(trb.prepare_params))
    except ValueError as error:
        raise UserError(str(error)) from error


def header(config: DictConfig) -> dict[str, str]:
    """What the screen says first."""
    from verl_trb.guidance import describe
    from verl_trb.objective import describe_objective

    trb = config.trb
    return {
        "recipe": f"{trb.recipe}, method {trb.method}" if trb.method else trb.recipe,
        "student": config.actor_rollout_ref.model.path or f"made by task {trb.prepare}",
        "teacher": trb.teacher.path or f"made by task {trb.prepare}",
        "rollouts": f"{describe(trb)}, γ {'≤' if trb.adapt_drafts else '='} {trb.draft_tokens}",
        "loss": describe_objective(trb),
        "results": trb.run_dir,
        "logs": f"{trb.run_dir}/logs",
    }


if __name__ == "__main__":
    sys.exit(main())

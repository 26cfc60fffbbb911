#!/usr/bin/env bash
# Builds sdist and wheel from what git knows, installs the wheel and the CPU lock into a new environment, and runs the
# quickstart from there, in another folder. Takes about 6 minutes and 5 GB, all in one temporary folder.
#
#   scripts/check_wheel.sh [OVERRIDE ...]        # overrides of the quickstart; FOLDER=... keeps everything there
#   ONLY_BUILD=1 scripts/check_wheel.sh          # the two files alone, their names on the last two lines
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3.11}
folder=${FOLDER:-$(mktemp -d)}
[[ -n ${FOLDER:-} ]] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)

echo "building sdist and wheel"
mkdir -p "$folder/source"
git -C "$repository" ls-files -z --cached --others --exclude-standard |
    tar -C "$repository" --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -C "$folder/source" -xf -
"$python" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install --quiet --disable-pip-version-check build
# The wheel is made from the sdist, which therefore is complete.
"$folder/build/bin/python" -m build --outdir "$folder/dist" "$folder/source" >"$folder/build.log" 2>&1 ||
    { tail -n 20 "$folder/build.log" >&2; exit 1; }
if [[ -n ${ONLY_BUILD:-} ]]; then
    ls "$folder"/dist/*.tar.gz "$folder"/dist/*.whl
    exit
fi

echo "installing the lock and the wheel into a new environment"
"$python" -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
lock=$repository/scripts/requirements-cpu.lock
torch=$(grep '^torch==' "$lock")
install "$torch" || install --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
install setuptools wheel
install --no-build-isolation -r "$lock"
install "$folder"/dist/*.whl

mkdir -p "$folder/elsewhere" && cd "$folder/elsewhere"
where=$("$folder/venv/bin/python" -c 'import verl_trb; print(verl_trb.__file__)')
[[ $where == "$folder/venv/"* ]] || { echo "verl_trb comes from $where, not from the wheel" >&2; exit 1; }
echo "running the quickstart from $where"
"$folder/venv/bin/python" -m verl_trb.main recipe=quickstart trb.run_dir=run "$@"
[[ -f run/student/config.json && -f run/report.png ]] || { echo "the run left no student or picture" >&2; exit 1; }
echo "the wheel runs"

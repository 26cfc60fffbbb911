#!/usr/bin/env bash
# Makes .venv with the complete CPU install (scripts/requirements-cpu.lock) and this package, editable.
# Called by make. A second call finds its stamp and does nothing; an interrupted one is taken up where it stopped.
# One line a stage on screen, pip's output in .venv/setup.log. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=scripts/requirements-cpu.lock
venv=.venv
log=$venv/setup.log
stamp=$venv/setup.stamp
torch_index=https://download.pytorch.org/whl/cpu

exec 9<"$lock"
flock 9 # `make quickstart` and `make test` at one time: the second waits

wanted=$(cat "$lock" pyproject.toml scripts/setup_cpu.sh | sha256sum)
wanted="$PWD $wanted"
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup failed: %s\n' "$1" >&2
    if [[ -s $log ]]; then
        printf -- '--- the end of %s ---\n' "$log" >&2
        grep -v "^WARNING: Location" "$log" | tail -n 15 >&2
    fi
    exit 1
}

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3 python; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$@" >>"$log" 2>&1; }

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) ||
        fail "no Python 3.11 or 3.12 with its venv module found; install one (Debian, Ubuntu: python3.12-venv) or set PYTHON=."
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "$python could not make $venv."
fi
rm -f "$stamp"
: >"$log"

torch=$(grep '^torch==' "$lock")
say "installing $torch"
if ! pip_install "$torch"; then
    # pip's own configuration knows no CPU build; PyTorch's index has it. Any other failure repeats itself here.
    pip_install --extra-index-url "$torch_index" "$torch" ||
        fail "neither pip's own sources nor $torch_index have $torch for this Python."
fi

say "installing $(grep -c '==' "$lock") packages of $lock (a few minutes, 4 GB)"
required=$venv/required.txt
optional=$venv/optional.txt
grep -v '# optional' "$lock" >"$required"
grep '# optional' "$lock" >"$optional" || true
pip_install -r "$required" || fail "pip cannot install $lock."
if [[ -s $optional ]] && ! pip_install -r "$optional"; then
    say "left out: $(cut -d' ' -f1 "$optional" | paste -sd' '), which needs a C compiler (only recipe=smollm2_pruned wants it)"
fi

say "installing verl_trb"
pip_install --no-build-isolation --editable . || fail "pip cannot install this package."
printf '%s\n' "$wanted" >"$stamp"
say "done"

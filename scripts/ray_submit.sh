#!/usr/bin/env bash
# Runs a recipe on a Ray cluster, shows its progress and ends with its exit code; --help says the rest.
#
#   scripts/ray_submit.sh recipe=qwen3_1p7b trainer.nnodes=2 trb.run_dir=/shared/runs/first
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
exec "$python" -m verl_trb.submit "$@"

#!/usr/bin/env bash
# Runs on a machine with an NVIDIA GPU what a CPU could not show; docs/gpu.md lists it.
#
#   scripts/gpu_check.sh               # all of it; PYTHON=... chooses the interpreter (default: .venv, else python3)
#   scripts/gpu_check.sh kernel run    # some of it: kernel, timing, engine, run
#
# Without a GPU `kernel` and `timing` (whose figures then say nothing) run in Triton's interpreter, and the others are
# left out, with a line that says so. Ends with 1 if any check failed. Install first: pip install -e '.[gpu,dev]'
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
checks=("$@")
((${#checks[@]})) || checks=(kernel timing engine run)

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
echo "gpu_check: ${gpu:-no GPU}"
failed=()

check() { # name, command...
    local name=$1
    shift
    echo "gpu_check: $name: $*"
    if "$@"; then echo "gpu_check: $name passed"; else failed+=("$name") && echo "gpu_check: $name FAILED"; fi
}

without_gpu() { echo "gpu_check: $1 left out: it needs a GPU"; }

for name in "${checks[@]}"; do
    case $name in
    kernel) # equal to the torch solver and to bisection
        if [[ -n $gpu ]]; then
            check kernel "$python" -m pytest tests/kernel_checks.py
        else
            check kernel env TRITON_INTERPRET=1 "$python" -m pytest tests/kernel_checks.py
        fi
        ;;
    timing) # the kernel, the torch solver and bisection at 256 x 151,936
        if [[ -n $gpu ]]; then
            check timing "$python" scripts/bench_kernel.py
        else
            check timing env TRITON_INTERPRET=1 "$python" -W ignore scripts/bench_kernel.py --rows 2 --size 5000 --repeats 1
        fi
        ;;
    engine) # rollouts of vLLM's GPU runner follow mu
        if [[ -n $gpu ]]; then
            check engine "$python" -m pytest -m 'slow or not slow' tests/test_engine_exact.py
        else
            without_gpu engine
        fi
        ;;
    run) # three training steps
        if [[ -n $gpu ]]; then
            check run "$python" -m verl_trb.main recipe=gpu_check trb.run_dir="runs/gpu_check_$(date +%s)"
        else
            without_gpu run
        fi
        ;;
    *)
        echo "gpu_check: there is no check '$name'; there are kernel, timing, engine, run" >&2
        exit 2
        ;;
    esac
done

((${#failed[@]} == 0)) || { echo "gpu_check: failed: ${failed[*]}" >&2 && exit 1; }
echo "gpu_check: all that ran passed"

#!/usr/bin/env bash
# A Ray cluster by hand: the head on one machine, a worker on each of the others. Ctrl-C (or SIGTERM) ends the node.
#
#   scripts/ray_cluster.sh head                  # first machine; says what the others need
#   scripts/ray_cluster.sh worker 10.0.0.1:6379  # every other machine
#   scripts/ray_cluster.sh token                 # makes the cluster's token, if there is none, and says where it is
#
# Nobody without the token gets in: it is Ray's own token authentication, on every connection. The dashboard, through
# which jobs come, listens on this machine alone. Ray's own traffic between nodes is not encrypted: use a private network.
#
# Environment, all optional:
#   RAY_AUTH_TOKEN_PATH   file of the token, ~/.ray/auth_token; the same content on every machine
#   NODE_IP               address that the other nodes reach this one by; Ray's guess
#   HEAD_PORT             6379
#   DASHBOARD_PORT        8265
#   DEVICES               GPUs of this node; Ray counts them. On a machine without any: logical ones, 1
#   CPUS                  CPUs of this node; Ray counts them. On a machine without GPUs: logical ones, 32
#   RAY_TMP               folder of Ray's sessions, /tmp/ray; an absolute path, and short: sockets are in it
#   RAY                   the ray command: .venv/bin/ray of this folder, else the one on the PATH
#   RAY_OPTIONS           more options of `ray start`, separated by spaces
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

ray=${RAY:-}
[[ -z $ray && -x $here/.venv/bin/ray ]] && ray=$here/.venv/bin/ray
ray=${ray:-$(command -v ray || true)}

# Token authentication whatever the environment says of it: there is no switch to leave it out.
export RAY_AUTH_MODE=token
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

make_token() {
    [[ -n ${RAY_AUTH_TOKEN:-} || -s $token_file ]] && return
    mkdir -p "$(dirname "$token_file")"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token_file") || fail "the token cannot be written to $token_file."
    printf 'a new token is in %s: copy that file to the same place on every other machine\n' "$token_file"
}

check_token() {
    [[ -n ${RAY_AUTH_TOKEN:-} ]] && return
    [[ -s $token_file ]] || fail "there is no token in $token_file; copy that file from the head, or name it in RAY_AUTH_TOKEN_PATH."
    local mode
    mode=$(stat -Lc %a "$token_file")
    [[ $mode == *00 ]] || fail "others on this machine may read the token $token_file (mode $mode); run: chmod 600 $token_file"
}

start() {
    [[ -x $ray ]] || fail "there is no ray command here; install verl_trb (make), or name it in RAY."
    local options=(--block --disable-usage-stats)
    [[ -n ${NODE_IP:-} ]] && options+=("--node-ip-address=$NODE_IP")
    if [[ -z ${DEVICES:-} && ! -e /dev/nvidiactl ]]; then
        DEVICES=1 CPUS=${CPUS:-32}
    fi
    [[ -n ${DEVICES:-} ]] && options+=("--num-gpus=$DEVICES")
    [[ -n ${CPUS:-} ]] && options+=("--num-cpus=$CPUS")
    # shellcheck disable=SC2206 # separated by spaces on purpose
    options+=(${RAY_OPTIONS:-})
    # Jobs run `python`: the one of this ray.
    PATH=$(cd "$(dirname "$ray")" && pwd):$PATH
    export PATH
    # The processes of a node must outlive neither this script nor one another.
    exec "$ray" start "$@" "${options[@]}"
}

case ${1:-} in
head)
    make_token
    check_token
    port=${HEAD_PORT:-6379}
    address=${NODE_IP:-$(hostname -I | cut -d' ' -f1)}:$port
    printf 'on every other machine: scripts/ray_cluster.sh worker %s\n' "$address"
    printf 'then, on this one:      scripts/ray_submit.sh recipe=NAME trb.run_dir=/SHARED/FOLDER\n'
    start --head "--port=$port" --include-dashboard=true --dashboard-host=127.0.0.1 "--dashboard-port=${DASHBOARD_PORT:-8265}" \
        ${RAY_TMP:+"--temp-dir=$RAY_TMP"}
    ;;
worker)
    [[ ${2:-} == *:* ]] || fail "give the head's address: scripts/ray_cluster.sh worker HOST:PORT"
    check_token
    start "--address=$2" ${RAY_TMP:+"--temp-dir=$RAY_TMP"}
    ;;
token)
    make_token
    check_token
    printf '%s\n' "$token_file"
    ;;
-h | --help)
    usage
    ;;
*)
    usage >&2
    exit 2
    ;;
esac

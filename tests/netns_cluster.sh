#!/usr/bin/env bash
# Two nodes that share no network device: a Ray cluster across two network namespaces of this machine, each with its own
# address, loopback device and routes, joined by a veth pair; the quickstart's models on two ranks and two engines,
# three steps on the data's responses, then three on rollouts.
#
#   sudo tests/netns_cluster.sh [FOLDER]     # root: makes namespaces, and always takes them down again
#
# From a third namespace, the machine's own, the dashboard cannot be reached. Prints PASSED, or what failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
a=trb-a-$$ b=trb-b-$$
address_a=10.213.0.1 address_b=10.213.0.2
short=/tmp/trb-ns-$$
pids=()

finish() {
    trap '' INT TERM
    for pid in "${pids[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do
        wait "$pid" 2>/dev/null || true
    done
    for space in "$a" "$b"; do
        # Whatever still runs in our own two namespaces, and nowhere else.
        ip netns pids "$space" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns delete "$space" 2>/dev/null || true
    done
    rm -rf "$short"
}
trap finish EXIT
fail() {
    printf 'FAILED: %s\n' "$1" >&2
    exit 1
}

ip netns add "$a"
ip netns add "$b"
ip link add veth-a netns "$a" type veth peer name veth-b netns "$b"
for pair in "$a veth-a $address_a" "$b veth-b $address_b"; do
    read -r space device address <<<"$pair"
    ip -n "$space" link set lo up
    ip -n "$space" address add "$address/24" dev "$device"
    ip -n "$space" link set "$device" up
    # Ray and vLLM find a machine's own address by the route to the outside, which need not answer.
    ip -n "$space" route add default dev "$device"
done

export RAY_AUTH_TOKEN_PATH=$folder/token DEVICES=1 CPUS=32
node() { # namespace device address number command...
    local space=$1 device=$2 address=$3 number=$4
    shift 4
    ip netns exec "$space" env "NODE_IP=$address" "RAY_TMP=$short/$number" "GLOO_SOCKET_IFNAME=$device" \
        "$root/scripts/ray_cluster.sh" "$@" >"$folder/node-$number.log" 2>&1 &
    pids+=($!)
    for ((waited = 0; ; waited++)); do
        grep -q "Ray runtime started" "$folder/node-$number.log" && return
        kill -0 "${pids[-1]}" 2>/dev/null || fail "node $number ended: $(tail -n 3 "$folder/node-$number.log")"
        ((waited < 600)) || fail "node $number did not start in 10 minutes"
        sleep 1
    done
}
node "$a" veth-a "$address_a" 1 head
node "$b" veth-b "$address_b" 2 worker "$address_a:6379"

# Even with the token: from the first node itself, and from nowhere else.
asked=(curl -s --noproxy '*' -m 3 -H "Authorization: Bearer $(<"$RAY_AUTH_TOKEN_PATH")")
ip netns exec "$a" "${asked[@]}" http://127.0.0.1:8265/api/version | grep -q ray_version || fail "no dashboard on the head"
if "${asked[@]}" "http://$address_a:8265/api/version" | grep -q ray_version; then
    fail "the dashboard answers outside its namespace"
fi
if ip netns exec "$b" "${asked[@]}" "http://$address_a:8265/api/version" | grep -q ray_version; then
    fail "the dashboard answers to the other node"
fi

if ip netns exec "$b" env RAY_ADDRESS="$address_a:6379" RAY_AUTH_MODE=disabled timeout 120 \
    "$root/.venv/bin/python" -c "import ray; ray.init(log_to_driver=False)" >"$folder/refused.log" 2>&1; then
    fail "the cluster takes a client without a token"
fi
grep -q "Authentication token is missing" "$folder/refused.log" || fail "a client without a token is not told why"

ip netns exec "$a" env RAY_ADDRESS=http://127.0.0.1:8265 "$root/scripts/ray_submit.sh" recipe=quickstart \
    trainer.nnodes=2 trainer.total_training_steps=6 trainer.test_freq=-1 trainer.val_before_train=false \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=24 trainer.resume_mode=disable \
    trb.data_response=reward_model.ground_truth 'trb.data_share=[[3,1],[4,0]]' \
    "trb.run_dir=$folder/run" "trb.cache_dir=${VERL_TRB_TEST_CACHE:-$folder/cache}" | tee "$folder/screen" ||
    fail "the job ended with an error"

for address in "$address_a" "$address_b"; do
    grep -q "^$address " "$folder/screen" || fail "the placement does not name $address"
    grep -lq BlendedHttpServer "$folder"/run/logs/*/"$address"/worker-*.out || fail "there was no engine on $address"
done
[[ $(wc -l <"$folder/run/metrics.jsonl") -eq 6 ]] || fail "there are not 6 steps in metrics.jsonl"
[[ -s $folder/run/student/model.safetensors ]] || fail "there is no student"
echo PASSED

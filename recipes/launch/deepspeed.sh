#!/usr/bin/env bash
# Train with DeepSpeed's launcher.
#
#     recipes/launch/deepspeed.sh [--KEY VALUE ...]                                # one machine
#     NODES=2 recipes/launch/deepspeed.sh [...]                                    # on the first machine; it reaches the others by ssh
#     NODES=2 MASTER_ADDR=node0 NODE_RANK=0 recipes/launch/deepspeed.sh [...]      # without ssh: on each machine, with its number
#
# Sizes: cluster.env; the machines' names and GPUs: HOSTFILE, by default the file hostfile beside this one. Over ssh the other
# machines get only the variables that ~/.deepspeed_env names, so set PYTHON's folder and the variables there.
set -euo pipefail
# shellcheck source=recipes/launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

machines=(--master_port "${MASTER_PORT:-29500}")
[ -z "$MASTER_ADDR" ] || machines+=(--master_addr "$MASTER_ADDR")
if [ "$NODES" -eq 1 ]; then
    machines+=(--num_gpus "$GPUS_PER_NODE")
else
    HOSTFILE="${HOSTFILE:-$LAUNCH/hostfile}"
    existing HOSTFILE
    machines+=(--hostfile "$HOSTFILE" --num_nodes "$NODES" --num_gpus "$GPUS_PER_NODE")
    [ -z "$NODE_RANK" ] || machines+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${machines[@]}" --no_python --no_local_rank "$LAUNCH/worker.sh" "$@"

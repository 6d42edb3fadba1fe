#!/usr/bin/env bash
# Train with Accelerate's launcher: start this on every machine of the run.
#
#     ACCELERATE_CONFIG=recipes/launch/accelerate/fsdp2.yaml recipes/launch/accelerate.sh [--KEY VALUE ...]
#     NODES=2 MASTER_ADDR=node0 NODE_RANK=0 recipes/launch/accelerate.sh [...]    # NODE_RANK=1 on the other machine
#
# Sizes: cluster.env; they win over those in accelerate/*.yaml. The program is pretrain_accelerate.py unless PROGRAM is set.
set -euo pipefail
PROGRAM="${PROGRAM:-$(dirname -- "${BASH_SOURCE[0]}")/../pretrain_accelerate.py}"
# shellcheck source=recipes/launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$LAUNCH/accelerate/ddp.yaml}"
existing ACCELERATE_CONFIG
machines=(--num_machines "$NODES" --num_processes $((NODES * GPUS_PER_NODE)) --main_process_port "${MASTER_PORT:-29500}")
if [ "$NODES" -gt 1 ]; then
    [ -n "$MASTER_ADDR" ] || fail "NODES is $NODES: set MASTER_ADDR to the first machine, as the others see it"
    [ -n "$NODE_RANK" ] || fail "NODES is $NODES: set NODE_RANK to this machine's number, 0 on MASTER_ADDR"
    machines+=(--main_process_ip "$MASTER_ADDR" --machine_rank "$NODE_RANK")
fi
exec "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" "${machines[@]}" \
    --max_restarts "$MAX_RESTARTS" --no_python "$LAUNCH/worker.sh" "$@"

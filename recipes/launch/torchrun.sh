#!/usr/bin/env bash
# Train with torchrun; start this on every machine of the run.
#
#     recipes/launch/torchrun.sh [--KEY VALUE ...]                   # one machine
#     NODES=2 MASTER_ADDR=node0 recipes/launch/torchrun.sh [...]     # the same command on both machines
#     NODES=4 MIN_NODES=2 MASTER_ADDR=node0 recipes/launch/torchrun.sh    # elastic: 2 to 4 machines
#
# Sizes: cluster.env. The options go to the program. If a worker dies, the workers of all machines start again from the last
# checkpoint, up to MAX_RESTARTS times. If a machine is lost, the others wait for a new one (RDZV_CONF): start the same
# command there. The machine MASTER_ADDR holds the store: if it is lost, start all machines again.
set -euo pipefail
# shellcheck source=recipes/launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# Prints this machine's address on the way to $1, whether $1 is this machine, and the network interface of the address.
# Connecting a UDP socket sends nothing. The name of a machine that is just starting may be unknown for a while.
ROUTE='
import fcntl, socket, struct, sys, time
name, waits = sys.argv[1], int(sys.argv[2])
for attempt in range(waits + 1):
    try:
        address = socket.gethostbyname(name)
        break
    except OSError as error:
        if attempt == 0:
            print(f"waiting for MASTER_ADDR {name}: {error}", file=sys.stderr)
        if attempt == waits:
            sys.exit(f"error: MASTER_ADDR is {name!r}, which this machine cannot resolve")
        time.sleep(1)
own_name = address.startswith("127.") and name not in ("localhost", address)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:  # Debian resolves the own name to 127.0.1.1, but the others use the address of the default route
        probe.connect(("192.0.2.1" if own_name else address, 9))
        local = probe.getsockname()[0]
    except OSError:
        local = "127.0.0.1"
    if own_name and local.startswith("127."):
        sys.exit(f"error: MASTER_ADDR {name} is {address} on this machine, which no other machine can reach: set its address")
    interface = ""
    for _, found in socket.if_nameindex():
        request = struct.pack("256s", found.encode()[:15])
        try:
            if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]) == local:  # SIOCGIFADDR
                interface = found
        except OSError:  # the interface has no address
            pass
print(local, int(local == address or address.startswith("127.")), interface)
'

agent=("$PYTHON" "$LAUNCH/agent.py" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
port="${MASTER_PORT:-29500}"
if [ "$NODES" -eq 1 ]; then
    agent+=(--nnodes 1 --standalone)
elif [ -z "$MASTER_ADDR" ]; then
    fail "NODES is $NODES: set MASTER_ADDR to the first machine, as the others see it"
else
    route="$("$PYTHON" -c "$ROUTE" "$MASTER_ADDR" "${RESOLVE_TIMEOUT:-120}")" \
        || fail "no route from this machine to MASTER_ADDR $MASTER_ADDR"
    read -r address is_host interface <<<"$route"
    # gloo and tensorpipe use the address of the host's name, which may be a loopback one; NCCL uses the first interface.
    if [ -n "$interface" ]; then
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" TP_SOCKET_IFNAME="${TP_SOCKET_IFNAME:-$interface}"
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
    fi
    if [ "$RDZV" = static ]; then
        [ -n "$NODE_RANK" ] || fail "RDZV is static: set NODE_RANK to this machine's number, 0 on MASTER_ADDR"
        agent+=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
    else
        if [ -n "$NODE_RANK" ]; then is_host=$((NODE_RANK == 0)); fi
        # torchrun cannot find out is_host and the address if the host's name does not resolve to the one the others use.
        agent+=(--nnodes "$MIN_NODES:$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "$RUN_ID"
            --rdzv-conf "is_host=$is_host${RDZV_CONF:+,$RDZV_CONF}" --local-addr "$address")
    fi
fi
exec "${agent[@]}" --no-python "$LAUNCH/worker.sh" "$@"

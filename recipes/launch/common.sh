# shellcheck shell=bash
# The launchers source this file. It reads cluster.env, sets what that leaves empty, and exports what every process needs.

LAUNCH="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
RECIPES="$(dirname -- "$LAUNCH")"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

whole_number() {  # $1: name of a variable, $2: smallest value
    if ! [[ "${!1}" =~ ^[0-9]+$ ]] || ((10#${!1} < $2)); then
        fail "$1 is '${!1}'; allowed: a whole number >= $2"
    fi
}

existing() {  # $1: name of a variable that holds a path; makes it absolute, as launchers change folders
    [ -f "${!1}" ] || fail "$1 is '${!1}': there is no such file"
    printf -v "$1" '%s' "$(cd -P -- "$(dirname -- "${!1}")" && pwd)/$(basename -- "${!1}")"
}

# Kubeflow Trainer gives the sizes in torchrun's variables, SkyPilot in its own; both win over cluster.env.
if [ -n "${PET_NNODES:-}" ]; then
    NODES="$PET_NNODES" NODE_RANK="${PET_NODE_RANK:-}" MASTER_ADDR="${PET_MASTER_ADDR:-}" MASTER_PORT="${PET_MASTER_PORT:-}"
    if [[ "${PET_NPROC_PER_NODE:-}" =~ ^[0-9]+$ ]]; then GPUS_PER_NODE="$PET_NPROC_PER_NODE"; fi
elif [ -n "${SKYPILOT_NUM_NODES:-}" ]; then
    NODES="$SKYPILOT_NUM_NODES" NODE_RANK="$SKYPILOT_NODE_RANK" MASTER_ADDR="${SKYPILOT_NODE_IPS%%[[:space:]]*}"
    if [ "${SKYPILOT_NUM_GPUS_PER_NODE:-0}" -gt 0 ]; then GPUS_PER_NODE="$SKYPILOT_NUM_GPUS_PER_NODE"; fi
fi

set -a
# shellcheck source=recipes/launch/cluster.env
source "$LAUNCH/cluster.env"
set +a

for name in MASTER_ADDR MASTER_PORT NODE_RANK; do  # programs read these and do not accept an empty value
    if [ -z "${!name}" ]; then export -n "${name?}"; fi
done

for name in NODES GPUS_PER_NODE MIN_NODES; do whole_number "$name" 1; done
whole_number MAX_RESTARTS 0
[ "$MIN_NODES" -le "$NODES" ] || fail "MIN_NODES is $MIN_NODES; allowed: at most NODES = $NODES"
[ -z "$NODE_RANK" ] || whole_number NODE_RANK 0
[ -z "$MASTER_PORT" ] || whole_number MASTER_PORT 1
case "$RDZV" in c10d | static) ;; *) fail "RDZV is '$RDZV'; allowed: c10d, static" ;; esac

[ -n "$PROGRAM" ] || PROGRAM="$RECIPES/pretrain.py"
if [ -z "$CONFIG" ]; then
    CONFIG=laptop
    if [ ! -f "$RECIPES/configs/laptop.yaml" ]; then  # a copy made by `cp` has one recipe
        copies=("$RECIPES"/*.yaml)
        [ -f "${copies[0]}" ] || fail "CONFIG is not set, and $RECIPES holds no YAML"
        [ "${#copies[@]}" -eq 1 ] || fail "CONFIG is not set, and $RECIPES holds several: $(basename -a -- "${copies[@]}" | paste -sd ' ')"
        CONFIG="${copies[0]}"
    fi
fi
for known in "$RECIPES/configs/$CONFIG.yaml" "$RECIPES/$CONFIG.yaml"; do  # the second is in a copy made by `cp`
    if [ -f "$known" ]; then CONFIG="$known" && break; fi
done
if [ -z "$PYTHON" ]; then
    PYTHON="$RECIPES/../.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON="$(command -v python3 || command -v python)" || fail "no python3; set PYTHON to its path"
fi
if "$PYTHON" -c 'import am_lightning.pretrain, yaml' 2>/dev/null; then  # the machine that submits a job may lack them
    "$PYTHON" -m am_lightning.pretrain.runtime.settings --config "$CONFIG" "$@" || exit 2  # a wrong setting or recipe
fi
existing PROGRAM
existing CONFIG
[ -n "$RUN_DIR" ] || RUN_DIR="runs/$(basename -- "$CONFIG" .yaml)"
case "$RUN_DIR" in /*) ;; *) RUN_DIR="$PWD/$RUN_DIR" ;; esac
export PROGRAM CONFIG RUN_DIR PYTHON

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # more than one only helps where cores outnumber processes
# torchrun (torch 2.13) cannot replace a lost machine while its workers share the agents' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# torchrun passes SIGUSR1 on, too, and lets a checkpoint take longer than 30 s before it kills processes that it signalled.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-600}"
# NCCL's flight recorder: if a collective hangs, every rank writes what it waited for; torchfrtrace reads the files.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$RUN_DIR/flight_recorder/rank_}"
if "$PYTHON" -c 'from importlib.metadata import version as v
raise SystemExit(list(map(int, v("torch").split(".")[:2])) >= [2, 9])' 2>/dev/null; then  # these versions know only the old names
    export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-$TORCH_FR_BUFFER_SIZE}"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$TORCH_FR_DUMP_TEMP_FILE}"
fi
mkdir -p "$RUN_DIR/flight_recorder" || fail "cannot make RUN_DIR $RUN_DIR"

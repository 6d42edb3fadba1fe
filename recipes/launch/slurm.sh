#!/usr/bin/env bash
# Submit a run to SLURM, from a machine that has sbatch:
#
#     NODES=2 GPUS_PER_NODE=8 CONFIG=1b recipes/launch/slurm.sh [--KEY VALUE ...]
#
# Sizes: cluster.env. The options go to the program; SBATCH_ARGS are sbatch's. The job's log is RUN_DIR/slurm-JOB.log.
set -euo pipefail
# shellcheck source=recipes/launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

command -v sbatch >/dev/null || fail "there is no sbatch on this machine"
case "$RUN_DIR" in *\\* | *$'\n'*) fail "RUN_DIR is '$RUN_DIR'; allowed under SLURM: a path without a backslash or a newline" ;; esac
read -ra options <<<"$SBATCH_ARGS"
export LAUNCH
exec sbatch --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --chdir="$PWD" --output="${RUN_DIR//%/%%}/slurm-%j.log" \
    --export=ALL ${options[@]+"${options[@]}"} "$LAUNCH/slurm.sbatch" "$@"

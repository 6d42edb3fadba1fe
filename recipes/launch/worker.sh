#!/usr/bin/env bash
# One process of a run. Every launcher starts this once per GPU, and it becomes the program.
#
# It sets the variables that the program and torch.distributed read from those of the launcher. `--ckpt_path last` resumes
# from the newest checkpoint or starts from step 0, so the same command is right after any failure.
set -euo pipefail

if [ -n "${GROUP_WORLD_SIZE:-}" ]; then  # torchrun, accelerate; with MIN_NODES there may be fewer after a machine was lost
    nodes="$GROUP_WORLD_SIZE" processes="$LOCAL_WORLD_SIZE"
elif [ -n "${CROSS_SIZE:-}" ]; then  # deepspeed; Lightning needs NODE_RANK
    nodes="$CROSS_SIZE" processes="$LOCAL_SIZE"
    export NODE_RANK="$CROSS_RANK"
elif [ -n "${SLURM_PROCID:-}" ]; then  # srun; Lightning reads SLURM's variables, the other programs these
    nodes="$SLURM_NNODES" processes="$SLURM_NTASKS_PER_NODE"
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
else
    echo "error: worker.sh is started by torchrun.sh, slurm.sh, accelerate.sh or deepspeed.sh" >&2
    exit 2
fi
exec "$PYTHON" "$PROGRAM" fit --config "$CONFIG" --ckpt_path last --trainer.default_root_dir "$RUN_DIR" \
    --trainer.num_nodes "$nodes" --trainer.devices "$processes" "$@"

#!/usr/bin/env bash
# Train the laptop recipe: create .venv, install what is missing, train, print where the results are, and let the model
# write a few lines.
#
#     recipes/quickstart.sh [--KEY VALUE ...]
#
#     recipes/quickstart.sh                             # 800 steps: under three minutes after the installation
#     recipes/quickstart.sh --ckpt_path last            # resume after an interruption, to the same bits
#     recipes/quickstart.sh --compare true              # also AdamW at beta1 0.9 and 0.8, and a plot of all runs
#     recipes/quickstart.sh --trainer.max_steps 20      # any key of recipes/configs/base.yaml, which explains each
#
# All keys: .venv/bin/python recipes/pretrain.py fit --help, after the installation.
# The run goes to runs/laptop in the repository unless --trainer.default_root_dir says otherwise.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # before anything is installed
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
ensure_venv "lightning,recipes"
exec "$PYTHON" "$AM_ROOT/recipes/quickstart.py" fit --config "$AM_ROOT/recipes/configs/laptop.yaml" \
    --trainer.default_root_dir "$AM_ROOT/runs/laptop" "$@"

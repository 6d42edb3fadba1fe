#!/usr/bin/env bash
# Train the laptop recipe from nothing: makes .venv and installs into it what is missing, trains, prints where to look.
#
#     recipes/quickstart.sh [--KEY VALUE ...]     # anything that pretrain.py fit takes, e.g. --trainer.max_steps 20
#
# The run goes to runs/laptop in the repository unless --trainer.default_root_dir says otherwise.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

ensure_venv "lightning,recipes"
exec "$PYTHON" "$AM_ROOT/recipes/pretrain.py" fit --config "$AM_ROOT/recipes/configs/laptop.yaml" \
    --trainer.default_root_dir "$AM_ROOT/runs/laptop" "$@"

#!/usr/bin/env bash
# Every test, on a machine with only Python >= 3.10: makes .venv, installs what the tests need, runs pytest.
#
#   tests/run.sh               all tests
#   tests/run.sh --fast        without those marked slow
#   tests/run.sh -k sgd -x     anything else goes to pytest; paths are relative to the repository's root
#
# The exit status is pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/env.sh
ensure_venv "dev,recipes,data,studies,docs,accelerate,deepspeed"

# Tests start processes of their own; one thread each keeps a small machine from thrashing.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

args=()
for arg in "$@"; do
    if [ "$arg" = "--fast" ]; then args+=(-m "not slow"); else args+=("$arg"); fi
done
exec "$PYTHON" -m pytest ${args[@]+"${args[@]}"}

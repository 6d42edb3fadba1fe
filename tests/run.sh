#!/usr/bin/env bash
# Every test, on a machine with only Python >= 3.10: makes .venv, installs what the tests need, runs pytest.
#
#   tests/run.sh               everything that a change may break
#   tests/run.sh --fast        the tests that take seconds, while writing
#   tests/run.sh --nightly     also all cases of tests with many cases, and more random examples; then tests/clients.sh,
#                              which installs other projects' programs (9 GB, 3 GB of it CUDA for torch)
#   tests/run.sh --ci          the tests of .ci/run: the default ones, and one case of each kind of --nightly
#   tests/run.sh -k sgd -x     anything else goes to pytest; paths are relative to the repository's root
#
# A gate runs on all cores (pytest-xdist, a file at a time); with arguments for pytest, tests run in one process.
# The exit status is pytest's; with --nightly it is that of tests/clients.sh if all earlier tests passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/env.sh
ensure_venv "dev,recipes,data,studies,docs,accelerate,deepspeed"
# litdata requires torchvision, which must match the installed build of torch and which token chunks do not need.
if ! "$PYTHON" -c 'import litdata' >/dev/null 2>&1; then
    install=("$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check)
    requirement="$(sed -n 's/^litdata = \["\(.*\)"\]$/\1/p' pyproject.toml)"
    "${install[@]}" boto3 obstore tifffile && "${install[@]}" --no-deps "$requirement" \
        || echo "litdata cannot be installed: its tests are skipped" >&2
fi

# Tests start processes of their own; one thread each keeps a small machine from thrashing.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

gate=full
args=()
parallel=(-n auto --dist loadfile)
for arg in "$@"; do
    case "$arg" in
        --fast | --nightly | --ci) gate="${arg#--}" ;;
        --durations=* | --junitxml=* | -q | -v) args+=("$arg") ;;
        *) args+=("$arg") parallel=() ;;
    esac
done
if [ "$gate" = nightly ]; then export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-nightly}"; fi
if [ "$gate" != full ] || [ ${#parallel[@]} != 0 ]; then args+=(--gate "$gate"); fi
command=("$PYTHON" -m pytest ${parallel[@]+"${parallel[@]}"} ${args[@]+"${args[@]}"})
if [ "$gate" != nightly ] || [ ${#parallel[@]} = 0 ]; then exec "${command[@]}"; fi
status=0
"${command[@]}" || status=$?
clients=0
tests/clients.sh || clients=$?
if [ "$status" = 0 ]; then status="$clients"; fi
exit "$status"

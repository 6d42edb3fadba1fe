#!/usr/bin/env bash
# Run the fast tests and 20 steps of the laptop recipe with other versions of the dependencies: docs/support.md.
#
#   tests/versions.sh                      all rows: floor, gpu-image, newest
#   tests/versions.sh floor newest         these rows
#   tests/versions.sh --keep newest        with the existing environment, however old it is
#   tests/versions.sh floor -- -k sgd -x   arguments after -- go to pytest
#
# floor       Python 3.10, the lowest versions that pyproject.toml names
# gpu-image   Python 3.12 with the packages of a common image for GPUs: no jsonargparse, deepspeed, datasets and others
# newest      Python 3.13, the newest versions of today
#
# The environments are in .versions/, 5 to 8 GB each, and are rebuilt after a change of this file or pyproject.toml, that
# of `newest` also once a day. pytest's output is in .versions/ROW.log. A row that ran without pytest arguments replaces
# its line in the page's table. The exit status is 0 if every test passed or was skipped and every run trained.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/environments.sh

FOLDER="$PWD/.versions"
EXTRAS=(
    --extra lightning --extra recipes --extra accelerate --extra transformers --extra data --extra studies
    --extra deepspeed
)
TOOLS=(pytest pytest-xdist hypothesis expecttest hatchling build)
GPU_IMAGE=(
    torch==2.11.0 triton==3.6.0 lightning==2.6.6 pytorch-lightning==2.6.6 accelerate==1.15.0 transformers==5.17.0
    torchmetrics tensorboard matplotlib tokenizers numpy jinja2 pyyaml filelock tqdm hypothesis pytest pytest-xdist
)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

install() { # $1: row, $2: interpreter, then uv's arguments
    local python="$2"
    shift 2
    "$UV" pip install --quiet --compile-bytecode --python "$python" "$@"
}

make_environment() { # $1: row, $2: base interpreter
    local python="$FOLDER/$1/bin/python" locked="$FOLDER/$1.txt"
    rm -rf "${FOLDER:?}/$1"
    "$UV" venv --quiet --no-python-downloads --python "$2" "$FOLDER/$1"
    case "$1" in
        floor)
            "$UV" pip compile --quiet --python "$python" --resolution lowest-direct pyproject.toml "${EXTRAS[@]}" \
                --output-file "$locked"
            install "$1" "$python" --requirement "$locked"
            install "$1" "$python" "${TOOLS[@]}" --constraint "$locked"
            ;;
        gpu-image) install "$1" "$python" "${GPU_IMAGE[@]}" ;;
        newest)
            "$UV" pip compile --quiet --python "$python" pyproject.toml "${EXTRAS[@]}" --extra triton \
                --output-file "$locked"
            install "$1" "$python" --requirement "$locked" "${TOOLS[@]}"
            ;;
    esac
    install "$1" "$python" --no-deps --editable .
}

ensure_environment() { # $1: row, $2: 3.X
    local base stamp
    stamp="$PWD $(cat pyproject.toml "${BASH_SOURCE[0]}" | cksum)"
    if [ "$1" = newest ]; then stamp="$stamp $(date +%F)"; fi
    if [ -f "$FOLDER/$1.stamp" ] && "$FOLDER/$1/bin/python" -c '' >/dev/null 2>&1; then
        if [ "$KEEP" = yes ] || [ "$(cat "$FOLDER/$1.stamp")" = "$stamp" ]; then return; fi
    fi
    base="$(find_python "$2")"
    find_uv
    echo "Making the environment $FOLDER/$1" >&2
    rm -f "$FOLDER/$1.stamp"
    make_environment "$1" "$base"
    printf '%s\n' "$stamp" >"$FOLDER/$1.stamp"
}

laptop_run() { # $1: row; prints what was run and how it ended
    local python="$FOLDER/$1/bin/python" program status=0
    rm -rf "${FOLDER:?}/$1-run"
    mkdir "$FOLDER/$1-run"
    if "$python" -c 'import jsonargparse' 2>/dev/null; then
        program="recipes/pretrain.py fit --config laptop, 20 steps"
        "$python" recipes/pretrain.py fit --config laptop --trainer.max_steps 20 --trainer.accelerator cpu \
            --trainer.default_root_dir "$FOLDER/$1-run" >"$FOLDER/$1-run.log" 2>&1 || status=$?
    else # every program of recipes/ reads its YAML with LightningCLI, which needs jsonargparse
        program="docs/start/lightning_callback.py, 100 steps (LightningCLI needs jsonargparse)"
        (cd "$FOLDER/$1-run" && "$python" ../../docs/start/lightning_callback.py) \
            >"$FOLDER/$1-run.log" 2>&1 || status=$?
    fi
    if [ "$status" = 0 ]; then echo "trained: $program"; else echo "FAILED ($FOLDER/$1-run.log): $program"; fi
}

count() { # $1: passed, skipped, failed or errors; of the last line of the log
    tail -n 1 "$2" | grep -oE "[0-9]+ $1" | cut -d' ' -f1 || echo 0
}

versions() { # $1: interpreter
    "$1" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

found = [python_version()]
for name in ("torch", "lightning", "accelerate", "transformers", "deepspeed"):
    try:
        found.append(version(name).partition("+")[0])
    except PackageNotFoundError:
        found.append("none")
print(" | ".join(found))
PY
}

update_page() { # $1: row, $2: its cells; only the table of versions has numbers in the two cells after the name
    sed -i -E "s#^(\| $1(:[^|]*)? \|) [0-9.]+ \| [0-9.]+ \|.*#\1 $2 |#" docs/support.md
}

run_row() { # $1: row, then pytest's arguments; returns 1 if something failed
    local row="$1" python="$FOLDER/$1/bin/python" log="$FOLDER/$1.log" trained failed cells
    shift
    "$python" -m pytest -n auto --dist loadfile --gate fast -q -rsfE --tb=short -p no:cacheprovider "$@" >"$log" 2>&1 || true
    trained="$(laptop_run "$row")"
    failed=$(($(count failed "$log") + $(count errors? "$log")))
    echo
    grep -E "^(FAILED|ERROR|SKIPPED)" "$log" | cut -c1-200 || true
    tail -n 1 "$log"
    echo "$row: $trained"
    cells="$(versions "$python") | $(count passed "$log") | $(count skipped "$log") | $failed"
    cells+=" | ${trained%%[: ]*} | $(date +%F)"
    echo "$row | $cells"
    if [ $# = 0 ]; then update_page "$row" "$cells"; fi
    [ "$failed" = 0 ] && [ "$(count passed "$log")" != 0 ] && [ "${trained#trained}" != "$trained" ]
}

KEEP=no
rows=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --keep) KEEP=yes ;;
        --)
            shift
            break
            ;;
        floor | gpu-image | newest) rows+=("$1") ;;
        *) fail "there is no row '$1': floor, gpu-image, newest" ;;
    esac
    shift
done
if [ ${#rows[@]} = 0 ]; then rows=(floor gpu-image newest); fi

mkdir -p "$FOLDER"
status=0
for row in "${rows[@]}"; do
    case "$row" in
        floor) version=3.10 ;;
        gpu-image) version=3.12 ;;
        newest) version=3.13 ;;
    esac
    ensure_environment "$row" "$version"  # not in run_row, which is called before ||: there a failing command would not end it
    run_row "$row" "$@" || status=1
done
exit "$status"

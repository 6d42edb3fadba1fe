#!/usr/bin/env bash
# Run tests/clients with other projects' programs, in the releases that the pages of docs/clients name.
#
#   tests/clients.sh                        both rows: programs, litgpt
#   tests/clients.sh litgpt                 this row
#   tests/clients.sh programs -- -k trl -x  arguments after -- go to pytest
#
# programs   tests/clients/requirements.txt and loggers.txt
# litgpt     tests/clients/litgpt.txt: it needs an older huggingface-hub than the others
#
# The environments are in .clients/, Python 3.11, 6 and 5 GB, most of it the torch of PyPI with 3 GB of CUDA (downloaded
# once, and stored once if uv can link from its cache). They are rebuilt after a change of this file, their requirements
# or pyproject.toml. Nothing is skipped: a package that cannot be installed or imported is a failure.
# tests/run.sh --nightly runs this after its own tests. The exit status is 0 if every test passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/environments.sh

FOLDER="$PWD/.clients"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export AM_CLIENTS_TESTS=1 # what is missing is a failure: tests/clients/__init__.py
export HF_HUB_OFFLINE=1   # tests make their models, tokenizers and data

ensure_environment() { # $1: row, $2: its requirements
    local base stamp
    stamp="$PWD $(cat "$2" tests/clients/loggers.txt pyproject.toml "${BASH_SOURCE[0]}" | cksum)"
    if [ -f "$FOLDER/$1.stamp" ] && "$FOLDER/$1/bin/python" -c '' >/dev/null 2>&1; then
        if [ "$(cat "$FOLDER/$1.stamp")" = "$stamp" ]; then return; fi
    fi
    base="$(find_python 3.11)"
    find_uv
    echo "Making the environment $FOLDER/$1" >&2
    rm -rf "$FOLDER/$1.stamp" "${FOLDER:?}/$1"
    "$UV" venv --quiet --no-python-downloads --python "$base" "$FOLDER/$1"
    "$UV" pip install --quiet --python "$FOLDER/$1/bin/python" --requirement "$2"
    "$UV" pip install --quiet --python "$FOLDER/$1/bin/python" --no-deps --editable .
    printf '%s\n' "$stamp" >"$FOLDER/$1.stamp"
}

rows=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        programs | litgpt) rows+=("$1") ;;
        *) fail "there is no row '$1': programs, litgpt" ;;
    esac
    shift
done
if [ ${#rows[@]} = 0 ]; then rows=(programs litgpt); fi

mkdir -p "$FOLDER"
status=0
for row in "${rows[@]}"; do
    case "$row" in
        programs) requirements=requirements.txt tests=(tests/clients tests/{lightning,huggingface}/test_images.py tests/loggers/test_attach.py --ignore tests/clients/test_litgpt.py) ;;
        litgpt) requirements=litgpt.txt tests=(tests/clients/test_litgpt.py) ;;
    esac
    ensure_environment "$row" "tests/clients/$requirements"
    "$FOLDER/$row/bin/python" -m pytest -n auto --dist loadfile --durations=5 -rs "${tests[@]}" "$@" || status=1
done
exit "$status"

#!/usr/bin/env bash
# Collects, on a machine with a network, what a GPU machine without one lacks: wheels for Python 3.12 on x86-64 Linux.
#
#   recipes/gpu/wheels.sh [DIR]          default: runs/wheels; then, there: recipes/gpu/check.sh --wheels DIR
#
# torch, lightning, transformers and what they bring along are expected there and are not collected. DeepSpeed is built
# from source without its operators, so nothing is compiled. Some 7 MiB; more than 60 are an error.
# The interpreter that downloads is $AM_PYTHON, else python3; it needs pip, and may be of another version.
set -euo pipefail

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
dir="${1:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)/runs/wheels}"
pip=("${AM_PYTHON:-python3}" -m pip --disable-pip-version-check --quiet)
limit=$((60 * 1024 * 1024))

download() {
    local tag platforms=()
    for tag in manylinux_2_28 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "${pip[@]}" download --dest "$dir" --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" "$@"
}

mkdir -p "$dir"
rm -f "$dir"/*.whl
# LightningCLI's; a contender and torch's tables of optimizers; DeepSpeed's.
download --no-deps "jsonargparse>=4.39" typeshed-client importlib-resources docstring-parser \
    schedulefree expecttest hjson ninja py-cpuinfo msgpack einops psutil
download pydantic # DeepSpeed's too; with its needs, because it works with one release of pydantic-core only
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-binary deepspeed --wheel-dir "$dir" "deepspeed>=0.19.8,<0.20"

bytes="$(cat "$dir"/*.whl | wc -c)"
(cd "$dir" && ls -- *.whl)
echo "$((bytes / 1024)) KiB in $dir"
if [ "$bytes" -gt "$limit" ]; then
    echo "error: more than $((limit / 1024)) KiB" >&2
    exit 1
fi

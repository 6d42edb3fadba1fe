#!/usr/bin/env bash
# Downloads the wheels that a GPU machine without a network lacks: for Python 3.12 on x86-64 Linux.
#
#   recipes/gpu/wheels.sh [DIR]          default: runs/wheels; then, on the GPU machine: recipes/gpu/check.sh --wheels DIR
#
# torch, lightning, transformers and their requirements are expected on that machine and are not downloaded. DeepSpeed is built
# from source without its operators, so nothing is compiled. About 7 MiB; more than 60 are an error.
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
# Requirements of LightningCLI, of the bench and of torch's lists of optimizers, and of DeepSpeed.
download --no-deps "jsonargparse>=4.39" typeshed-client importlib-resources docstring-parser \
    schedulefree expecttest hjson ninja py-cpuinfo msgpack einops psutil
download pydantic # DeepSpeed needs it; its requirements come along, because it works with one release of pydantic-core only
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-binary deepspeed --wheel-dir "$dir" "deepspeed>=0.19.8,<0.20"

bytes="$(cat "$dir"/*.whl | wc -c)"
(cd "$dir" && ls -- *.whl)
echo "$((bytes / 1024)) KiB in $dir"
if [ "$bytes" -gt "$limit" ]; then
    echo "error: more than $((limit / 1024)) KiB" >&2
    exit 1
fi

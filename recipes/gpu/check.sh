#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command: what runs, whether it is right, how fast it is, what it is worth.
#
#   recipes/gpu/check.sh                       25 minutes of it, into runs/gpu
#   recipes/gpu/check.sh --minutes 9           the same command again goes on with what is missing
#   recipes/gpu/check.sh --wheels runs/wheels  with what recipes/gpu/wheels.sh collected before
#   recipes/gpu/check.sh --only right          one part, or the parts of a kind: facts, right, fast, worth; again if need be
#   recipes/gpu/check.sh --device cpu --tiny --out runs/rehearsal   a rehearsal at toy sizes
#   python -m recipes.gpu.page runs/gpu                  makes docs/gpu.md
#
# It uses the machine's own Python ($AM_PYTHON, else the first of python3, python that can import torch) and installs nothing
# into it: wheels go into a folder below --out, and so do all caches. No network and no writable home are needed.
# Every part writes a JSON file as soon as it is done. --out is all that has to be kept; of it, results.json says enough.
set -euo pipefail
here="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
for python in ${AM_PYTHON:+"$AM_PYTHON"} python3 python; do
    if "$python" -c 'import sys, torch; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        exec "$python" "$here/check.py" "$@"
    fi
done
echo "error: no Python here can import torch: tried ${AM_PYTHON:+$AM_PYTHON, }python3, python. Set AM_PYTHON to one that can." >&2
exit 1

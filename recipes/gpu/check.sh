#!/usr/bin/env bash
# Runs everything that only a GPU can answer: what works, whether it is right, how fast it is, and what it is worth.
#
#   recipes/gpu/check.sh                       25 minutes, into runs/gpu
#   recipes/gpu/check.sh --minutes 9           the same command again runs what is missing
#   recipes/gpu/check.sh --wheels runs/wheels  with the wheels of recipes/gpu/wheels.sh
#   recipes/gpu/check.sh --only right          one part, or a kind of parts (facts, right, fast, worth), even if done
#   recipes/gpu/check.sh --device cpu --tiny --out runs/rehearsal   a rehearsal at toy sizes
#   python -m recipes.gpu.page runs/gpu                  makes docs/gpu.md
#
# It uses the machine's own Python ($AM_PYTHON, else the first of python3, python that can import torch) and installs nothing
# into it: wheels go into a folder below --out, and so do all caches. No network and no writable home are needed.
# Every part writes its answer into results.json in --out as soon as it is done. That file is enough to continue elsewhere.
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

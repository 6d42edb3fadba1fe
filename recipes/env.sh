# For recipes/quickstart.sh and tests/run.sh; bash sources it:
#
#     source recipes/env.sh
#     ensure_venv "lightning,recipes"     # a comma-separated list of the package's extras, "" for none
#     "$PYTHON" ...
#
# ensure_venv creates .venv in the repository's root if it does not exist, installs what is missing (the package itself in
# editable mode, the extras, torch) and sets PYTHON. It uses a torch that the interpreter can import, and installs
# TORCH_REQUIREMENT otherwise. If the interpreter has all packages that the extras need, .venv shares them and gets the
# checkout's path: nothing is built or installed, and no network is needed.
# The interpreter is $AM_PYTHON if set, else the first of python3, python, python3.14 ... python3.10 that is 3.10 or newer.

AM_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_REQUIREMENT="torch==2.13.0"
# Exits with 0 if torch can be imported and is not older than pyproject.toml allows.
_AM_HAS_TORCH='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))'

_am_fail() {
    printf 'error: %s\n' "$*" >&2
    return 1
}

_am_find_python() {  # prints the path of an interpreter that is new enough
    local name found=""
    for name in ${AM_PYTHON:+"$AM_PYTHON"} python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        command -v "$name" >/dev/null 2>&1 || continue
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
        found="$found $name"
    done
    _am_fail "Python 3.10 or newer is needed; found${found:- no python at all}. Install one, or set AM_PYTHON to its path."
}

_am_add_to_path() {  # $1: name of a .pth file of .venv; its lines come from stdin
    local folder
    folder="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" && cat >"$folder/$1.pth"
}

_am_share_torch() {  # $1: interpreter; if it can import torch, .venv also finds its packages (after its own)
    "$1" -c "$_AM_HAS_TORCH" >/dev/null 2>&1 || return 0
    "$1" -c 'import os, sys
for p in sys.path:
    if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p):
        print(f"import site; site.addsitedir({p!r})")' | _am_add_to_path shared_with_base
}

_am_has_requirements() {  # $1: extras; succeeds if all their requirements, and the requirements of those, are installed
    "$PYTHON" -c "$_AM_HAS_TORCH" >/dev/null 2>&1 && "$PYTHON" - "$AM_ROOT/pyproject.toml" "$1" 2>/dev/null <<'PY'
import sys
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
waiting, seen = [f"{project['name']}[{sys.argv[2]}]"], set()
while waiting:
    text = waiting.pop()
    requirement = Requirement(text)
    if text in seen or requirement.name == "torch":  # torch can be imported, perhaps without the metadata of its parts
        continue
    seen.add(text)
    if requirement.name == project["name"]:
        extras = project.get("optional-dependencies", {})
        needs = sum((extras[extra] for extra in requirement.extras), project.get("dependencies", []))
    else:
        found = metadata.distribution(requirement.name)  # raises an error if it is missing
        if not requirement.specifier.contains(found.version, prereleases=True):
            sys.exit(1)
        needs = found.requires or []
    for need in map(Requirement, needs):
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            need.marker = None
            waiting.append(str(need))
PY
}

_am_install() {  # $1: extras
    local torch=()
    if _am_has_requirements "$1"; then
        echo "All packages that am_lightning${1:+[$1]} needs are installed: $AM_ROOT/.venv shares them" >&2
        printf '%s\n' "$AM_ROOT" | _am_add_to_path am_lightning_checkout  # as an editable installation does
        return
    fi
    if ! "$PYTHON" -c "$_AM_HAS_TORCH" >/dev/null 2>&1; then
        torch=("$TORCH_REQUIREMENT")
        echo "Installing $TORCH_REQUIREMENT: a large download, once" >&2
    fi
    echo "Installing am_lightning${1:+[$1]} into $AM_ROOT/.venv" >&2
    "$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check \
        ${torch[@]+"${torch[@]}"} -e "$AM_ROOT${1:+[$1]}" \
        || _am_fail "pip could not install into $AM_ROOT/.venv (its message is above). The same command tries again."
}

_am_ensure_venv_locked() {
    local base stamps stamp
    PYTHON="$AM_ROOT/.venv/bin/python"
    stamps="$AM_ROOT/.venv/am_lightning-installed"
    # An installation depends on the folder (it is editable), the requirements and the extras.
    stamp="$AM_ROOT $(cksum <"$AM_ROOT/pyproject.toml") [$1]"
    if [ -f "$stamps" ] && "$PYTHON" -c '' >/dev/null 2>&1 && grep -qxF -- "$stamp" "$stamps"; then
        return 0
    fi
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # missing, incomplete, or without its base interpreter
        base="$(_am_find_python)" || return 1
        echo "Creating the virtual environment $AM_ROOT/.venv" >&2
        "$base" -m venv --clear "$AM_ROOT/.venv" \
            || _am_fail "$base cannot create $AM_ROOT/.venv (see above). If ensurepip is missing: apt install python3-venv" \
            || return 1
        _am_share_torch "$base" || return 1
    fi
    _am_install "$1" && printf '%s\n' "$stamp" >>"$stamps"
}

ensure_venv() {
    local status=0
    # One installation at a time. The lock on pyproject.toml ends with the descriptor.
    exec 9<"$AM_ROOT/pyproject.toml" || return 1
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    _am_ensure_venv_locked "${1:-}" || status=$?
    exec 9<&-
    export PYTHON
    return "$status"
}

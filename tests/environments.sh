# shellcheck shell=bash
# Functions of tests/versions.sh and tests/clients.sh, which build environments in $FOLDER. Source this file with bash.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

find_python() { # $1: 3.X; prints an interpreter that runs: on PATH, else pyenv's
    local candidate
    for candidate in "python$1" "$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "Python $1 is needed for this row: neither python$1 on PATH nor pyenv has one that runs"
}

find_uv() { # sets UV; one that is not on PATH is installed into an environment of its own
    UV="$(command -v uv || true)"
    if [ -z "$UV" ]; then
        UV="$FOLDER/uv/bin/uv"
        if [ ! -x "$UV" ]; then
            python3 -m venv "$FOLDER/uv"
            "$FOLDER/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
        fi
    fi
}

# Sourced by the launch scripts: finds Python 3.12, builds .venv once, and reuses it from then on.
#
#   source launch/_env.sh
#   prepare_environment [EXTRA ...]     # extras of pyproject.toml, e.g. dev
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Path of a Python 3.12 that starts: on PATH, in pyenv, or known to uv.
find_python() {
    local candidate
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 python3; do
        # pyenv puts a python3.12 on PATH that fails where no 3.12 is selected
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    uv python find --no-python-downloads 3.12 2>/dev/null
}

create_venv() {
    local python
    if ! python=$(find_python); then
        echo "Python 3.12 not found on PATH, in pyenv or through uv; install it, for example with:" \
            "apt install python3.12-venv, pyenv install 3.12, or uv python install 3.12" >&2
        return 1
    fi
    echo "creating .venv with $python"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv .venv
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python "$python" .venv
    else
        echo "$python has no venv module; install it (apt install python3.12-venv) or install uv" >&2
        return 1
    fi
}

# Install the package and its extras at the tested versions, unless this has been done.
prepare_environment() {
    cd "$REPO" || return 1
    # containers often set it, and then each of many processes compiles everything it imports anew
    unset PYTHONDONTWRITEBYTECODE
    if [[ ! -x .venv/bin/python ]]; then
        rm -rf .venv
        create_venv || return 1
    fi
    local hash extras stamp=.venv/prism-installed
    hash=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
    extras=$(IFS=,; echo "$*")
    # whatever extras were installed, the package itself was too
    if ! grep -qs "^$hash .*$extras" "$stamp"; then
        echo "installing into .venv (once; about 5 GB, some minutes)"
        # most modules are never imported; the others are compiled when they are
        local install=(.venv/bin/python -m pip install --disable-pip-version-check --no-compile)
        "${install[@]}" -c constraints.txt "setuptools>=77" &&
            "${install[@]}" --no-build-isolation -c constraints.txt \
                -e ".${extras:+[$extras]}" || return 1
        echo "$hash $extras" >>"$stamp"
    fi
    PATH=$REPO/.venv/bin:$PATH
}

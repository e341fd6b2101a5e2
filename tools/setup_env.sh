#!/usr/bin/env bash
# Makes .venv with requirements.txt and this package (editable). Called by the Makefile; does nothing
# when .venv is up to date.
#
# CPython 3.10 is preferred, because Detectron2 exists as a ready wheel for it. Any newer Python works
# too, but has to build Detectron2 from its git repository, which needs git and a C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.set-up
# The folder is part of the key: neither a venv nor an editable install survives being moved.
key="$(pwd) $(cat requirements.txt setup.cfg pyproject.toml | cksum)"

if [[ -f $stamp && "$(cat "$stamp")" == "$key" ]]; then
    exit 0
fi

say() { echo "[set-up] $*"; }

# usable PYTHON CONDITION: it runs (a pyenv shim may not), can make a venv, and its version fits.
usable() {
    "$1" -c "import ensurepip, sys, venv; sys.exit(not ($2))" >/dev/null 2>&1
}

find_python() {
    local pyenv_versions="${PYENV_ROOT:-$HOME/.pyenv}/versions" candidate
    for candidate in python3.10 "$pyenv_versions"/3.10*/bin/python3.10 python3 python; do
        if usable "$candidate" "sys.version_info[:2] == (3, 10)"; then
            echo "$candidate"
            return
        fi
    done
    for candidate in python3 python3.{11..14} "$pyenv_versions"/3.*/bin/python3 python; do
        if usable "$candidate" "sys.version_info >= (3, 10)"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# A stamp of another key means a whole .venv that only needs new versions. Without a stamp it is
# half-made (a killed set-up), and pip cannot tell which of its packages are whole: start over.
if [[ -f $stamp && "$(cat "$stamp")" == "$(pwd) "* ]] && "$venv/bin/python" -c "" 2>/dev/null; then
    say "requirements have changed: updating $venv"
    rm "$stamp"
else
    if ! python="$(find_python)"; then
        echo "error: no usable Python was found. Looked for python3.10 on PATH and in" \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions, then for any Python >= 3.10 that has the venv and" \
            "ensurepip modules. Install Python 3.10 (for instance: pyenv install 3.10; on Debian also" \
            "the package python3-venv) and try again." >&2
        exit 1
    fi
    say "making $venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

pip_install() {
    "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"
}

# PyTorch goes first: Detectron2's own build imports it, and needs build isolation off to see it.
say "1/3 installing PyTorch (large: minutes on a slow line)"
pip_install $(grep -E "^(setuptools|wheel|torch|torchvision)==" requirements.txt | sed "s/ *#.*//")
say "2/3 installing the other requirements"
if usable "$venv/bin/python" "sys.version_info[:2] == (3, 10)"; then
    pip_install -r requirements.txt
else
    say "    and building Detectron2 from its git repository (about ten minutes)"
    pip_install --no-build-isolation -r requirements.txt
fi
say "3/3 installing detectron2_nats (editable)"
pip_install --no-build-isolation --no-deps --editable .

echo "$key" >"$stamp"
say "done"

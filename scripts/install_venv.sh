#!/usr/bin/env bash
# Makes or completes a virtual environment:  install_venv.sh PYTHON VENV EXTRAS
# It holds kernelgen itself (editable) and the packages of the extras.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2 extras=$3

fail() {
    echo "make install: $*" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "there is no $python on the path; install Python 3.11 or newer, or name one:" \
        "make install PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" --version 2>&1), but kernelgen needs 3.11 or newer;" \
        "name one: make install PYTHON=python3.12"

# An environment whose Python is gone (moved, or its system upgraded) is made anew.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -c 'import venv, pip' 2>/dev/null; then
        # Debian keeps ensurepip in a package of its own, but the pip that is there can help out.
        "$python" -m venv --without-pip "$venv" &&
            "$python" -m pip --python "$venv/bin/python" install --quiet pip ||
            fail "$python has no ensurepip, and its pip could not fill $venv; on Debian and" \
                "Ubuntu run: apt-get install python3-venv, then make install again"
    else
        fail "$python has neither ensurepip nor pip, so $venv cannot be made; on Debian and" \
            "Ubuntu run: apt-get install python3-venv, then make install again"
    fi
fi

echo "make install: installing kernelgen[$extras] into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" ||
    fail "pip could not install what pyproject.toml names (see above); is a package index in reach?"

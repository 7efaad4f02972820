#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv, or bring it up to date if a file that says what belongs in it has changed.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PYTHON=${PYTHON:-/usr/bin/python3}
requirements=(requirements.txt test-requirements.txt doc/requirements.txt)
stamp=$VENV/.stamp
# The path belongs to the key: a virtual environment cannot be moved
key=$({
    "$PYTHON" --version
    echo "$ROOT"
    cat "${requirements[@]}" setup.cfg setup.py pyproject.toml "${BASH_SOURCE[0]}"
} | sha256sum)

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi
say "Virtual environment: $VENV"
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    "${requirements[@]/#/--requirement=}" --editable .
link_ceph_modules "$VENV"
echo "$key" >"$stamp"

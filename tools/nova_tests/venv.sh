#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the virtual environment of a release of Nova, or bring it up to date: venv.sh 34.
# It has Nova, what Nova's tests need, and this repository (editable), at .make/nova-34.
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

release=$1
PYTHON=${PYTHON:-/usr/bin/python3}
tests=tools/nova_tests/requirements
venv=$ROOT/.make/nova-$release
stamp=$venv/.stamp
requirements=("$tests/nova-$release.txt" "$tests/common.txt")
# The path belongs to the key: a virtual environment cannot be moved
key=$({
    "$PYTHON" --version
    echo "$ROOT"
    cat "${requirements[@]}" requirements.txt setup.cfg setup.py pyproject.toml "${BASH_SOURCE[0]}"
} | sha256sum)

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi
say "Virtual environment of Nova $release: $venv"
# Pins may have gone up or down, and pip leaves alone what still fits
"$PYTHON" -m venv --clear "$venv"
# Most of its modules are never imported; Python compiles those that are
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    "${requirements[@]/#/--requirement=}" --editable .
# Nova's tests look for etc/nova/api-paste.ini beside the package; the wheel puts it into $venv/etc
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
ln -sfn "$venv/etc" "$site/etc"
echo "$key" >"$stamp"

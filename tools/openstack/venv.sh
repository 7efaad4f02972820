#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the virtual environment of the OpenStack lab, or bring it up to date: .make/openstack-34, of
# Nova's release 34. It has the services, their client, and this repository (editable).
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

release=34
PYTHON=${PYTHON:-/usr/bin/python3}
here=tools/openstack
venv=$ROOT/.make/openstack-$release
stamp=$venv/.stamp
# The path belongs to the key: a virtual environment cannot be moved
key=$({
    "$PYTHON" --version
    echo "$ROOT"
    cat "$here"/*.txt requirements.txt setup.cfg setup.py pyproject.toml "${BASH_SOURCE[0]}"
} | sha256sum)

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi
say "Virtual environment of the OpenStack lab: $venv"
"$PYTHON" -m venv --clear "$venv"
# Most of its modules are never imported; Python compiles those that are
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --requirement "$here/requirements.txt" --constraint "$here/constraints.txt" \
    --editable ".[nova,host,report]"
link_ceph_modules "$venv"
# An installation puts the driver where Nova looks for it; an editable one leaves it in this tree
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
ln -sfn "$ROOT/nova/virt/dmigrate" "$site/nova/virt/dmigrate"
echo "$key" >"$stamp"

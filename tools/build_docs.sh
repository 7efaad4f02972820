#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the documentation and the release notes; a warning is an error.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export PATH=$VENV/bin:$PATH
sphinx-build -W --keep-going -E -q -b html doc/source doc/build/html
# reno walks the history, which a shallow clone does not have; the notes' form is checked anyway
if [ "$(git rev-parse --is-shallow-repository)" = true ]; then
    echo "Shallow clone: release notes are not built"
    exit 0
fi
sphinx-build -W --keep-going -E -q -b html releasenotes/source doc/build/releasenotes

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the documentation and the release notes; a warning is an error.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export PATH=$VENV/bin:$PATH
sphinx-build -W --keep-going -E -q -b html doc/source doc/build/html
sphinx-build -W --keep-going -E -q -b html releasenotes/source doc/build/releasenotes

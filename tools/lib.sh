# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: the shell's strictness, the root of the repository, the tools.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=${NDM_VENV:-$ROOT/.venv}
# Results of the last run, kept for a look; "make clean" removes them
STATE=${NDM_STATE:-$ROOT/.make}
mkdir -p "$STATE"

say() { printf '\n=== %s\n' "$*"; }

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

# Ceph's Python modules are no packages of PyPI. Debian's are linked into a virtual environment, those
# two alone; their names say for which Python they are, so that another one does not take them.
link_ceph_modules() {
    local site module file
    site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    for module in rados rbd; do
        for file in /usr/lib/python3/dist-packages/"$module".cpython-*.so; do
            if [ -e "$file" ]; then ln -sf "$file" "$site/"; fi
        done
    done
}

say() { printf '\n=== %s\n' "$*"; }

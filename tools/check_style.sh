#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Style, format, types, shell scripts, release notes.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

status=0
"$VENV/bin/ruff" check --output-format=concise . || status=1
"$VENV/bin/ruff" format --check --output-format=concise . || status=1
"$VENV/bin/mypy" --strict nova_dmigrate || status=1
"$VENV/bin/python" tools/check_python39.py || status=1
"$VENV/bin/reno" --quiet lint || status=1
# What a guest runs is put together of files that set each other's variables
mapfile -t parts < <(git ls-files 'tests/lab/*.sh')
mapfile -t scripts < <(git ls-files '*.sh' '.ci/*' devstack/settings 'devstack/lib/*' \
    'elements/*.d/*' tests/unit/devstack/rabbitmqctl ':!tests/lab')
"$VENV/bin/shellcheck" --format=gcc --shell=bash --severity=warning \
    --exclude=SC1090,SC2034,SC2154 "${parts[@]}" || status=1
"$VENV/bin/shellcheck" --format=gcc --shell=bash --external-sources --source-path=SCRIPTDIR \
    "${scripts[@]}" || status=1
# The style of devstack, for what is sourced by it
mapfile -t scripts < <(git ls-files 'devstack/*.sh' devstack/settings 'devstack/lib/*')
"$VENV/bin/bashate" --max-line-length 100 --error E005,E006,E042,E043 "${scripts[@]}" || status=1
while read -r file; do
    echo "$file: no SPDX-License-Identifier in its first lines"
    status=1
done < <(git ls-files '*.py' '*.sh' '*.c' | xargs -r grep -L 'SPDX-License-Identifier: Apache-2.0')
exit $status

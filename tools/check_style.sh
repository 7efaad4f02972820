#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Style, format, types, release notes.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

status=0
"$VENV/bin/ruff" check --output-format=concise . || status=1
"$VENV/bin/ruff" format --check --output-format=concise . || status=1
"$VENV/bin/mypy" --strict nova_dmigrate || status=1
"$VENV/bin/python" tools/check_python39.py || status=1
"$VENV/bin/reno" --quiet lint || status=1
while read -r file; do
    echo "$file: no SPDX-License-Identifier in its first lines"
    status=1
done < <(git ls-files '*.py' '*.sh' '*.c' | xargs -r grep -L 'SPDX-License-Identifier: Apache-2.0')
exit $status

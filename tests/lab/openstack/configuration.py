# SPDX-License-Identifier: Apache-2.0
"""Configuration files of OpenStack's services."""

from collections.abc import Mapping, Sequence
from pathlib import Path

#: Options by group and name; lists are joined by commas.
Options = Mapping[str, Mapping[str, object]]


def write(path: Path, *parts: Options) -> Path:
    """Write a file; of parts that say the same option the last one counts."""
    merged: dict[str, dict[str, object]] = {}
    for part in parts:
        for group, options in part.items():
            merged.setdefault(group, {}).update(options)
    lines = []
    for group, options in merged.items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {_text(value)}" for name, value in options.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)

# SPDX-License-Identifier: Apache-2.0
"""QEMU with 8 KiB of RAM more than libvirt asks for: libvirt rounds memory to MiB.

QEMU under TCG loses no dirty page of a RAMBlock of such a size; GuestSpec.ram_bytes says why. The
domain's XML names this program as its emulator. It runs by itself, without this tree.
"""

import os
import re
import sys
from pathlib import Path

QEMU = "/usr/bin/qemu-system-x86_64"
MORE = 8192


def exact(arguments: list[str]) -> list[str]:
    """The arguments with the RAM made larger; any others as they are."""
    result, after = [], ""
    for argument in arguments:
        if after == "-m":
            argument = re.sub(r"^(size=)?(\d+)(k?)", _larger, argument, count=1)
        elif after == "-object" and '"pc.ram"' in argument:
            argument = re.sub(
                r'("size":)(\d+)', lambda m: f"{m[1]}{int(m[2]) + MORE}", argument, count=1
            )
        result.append(argument)
        after = argument
    return result


def script(interpreter: str, qemu: str = QEMU) -> str:
    """The program's text, to be written on a host.

    :param qemu: where QEMU itself is there.
    """
    text = Path(__file__).read_text().replace(f'\nQEMU = "{QEMU}"', f'\nQEMU = "{qemu}"')
    return f"#!{interpreter} -I\n{text}"


def _larger(match: "re.Match[str]") -> str:
    unit = 10 if match[3] else 20
    return f"{match[1] or ''}{((int(match[2]) << unit) + MORE) >> 10}k"


if __name__ == "__main__":
    os.execv(QEMU, [QEMU, *exact(sys.argv[1:])])

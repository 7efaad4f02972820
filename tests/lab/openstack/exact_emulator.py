# SPDX-License-Identifier: Apache-2.0
"""Has libvirt run QEMU by the program that gives guests a size of RAM with which emulated guests
lose no page (`tests.lab.emulator`). Nova names no emulator, so that it has the usual one's place.
"""

import shutil
import sys
from pathlib import Path

from tests.lab import emulator
from tests.lab.libvirt_host import LibvirtHost


def install(host: LibvirtHost) -> None:
    """Put it in QEMU's place, on that host alone, and start libvirtd anew."""
    usual = Path(emulator.QEMU)
    directory = host.directory / "programs"
    directory.mkdir()
    # In the same directory: QEMU looks for its firmware from where it is
    real = usual.with_suffix(".real")
    shutil.copy2(usual, directory / real.name)
    program = directory / usual.name
    program.write_text(emulator.script(sys.executable, str(real)))
    program.chmod(0o755)
    layers = f"lowerdir={directory}:{usual.parent}"
    host.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(usual.parent)])
    host.stop_libvirtd()
    host.start_libvirtd()

# SPDX-License-Identifier: Apache-2.0
"""What a report says of the machine on which it was measured."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.lab.database_guest import DatabaseGuest
from tests.lab.demo.stage import Shape, Stage


def machine(stage: Stage) -> dict[str, Any]:
    """Texts, numbers and truths by name. ``compression``: whether relays may compress."""
    known = machine_of(stage.guests[0].guest, stage.shape)
    return {**known, "compression": stage.shape.compression}


def machine_of(guest: DatabaseGuest, shape: Shape) -> dict[str, Any]:
    """The same of one guest, and without what belongs to migrations."""
    return {
        **bare_machine(),
        "guest": f"{shape.ram_mb} MiB of RAM, {guest.spec.smp} emulated processor",
        "server": f"{shape.release.flavour} {guest.sql('SELECT VERSION()').strip()}",
        "pool_mib": shape.pool_mb,
    }


def bare_machine() -> dict[str, Any]:
    """The same without any guest."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "qemu": _version("qemu-system-x86_64", "--version"),
        "libvirt": _version("libvirtd", "--version"),
    }


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _version(*argv: str) -> str:
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found[0] if found else "unknown"

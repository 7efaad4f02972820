# SPDX-License-Identifier: Apache-2.0
"""What a report says of the machine on which it was measured."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.lab.demo.stage import Stage


def machine(stage: Stage) -> dict[str, Any]:
    """Texts, numbers and truths by name. ``compression``: whether relays may compress."""
    first = stage.guests[0]
    server = first.guest.sql("SELECT VERSION()").strip()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "qemu": _version("qemu-system-x86_64", "--version"),
        "libvirt": _version("libvirtd", "--version"),
        "guest": f"{stage.shape.ram_mb} MiB of RAM, {first.domain.spec.smp} emulated processor",
        "server": f"{stage.shape.release.flavour} {server}",
        "pool_mib": stage.shape.pool_mb,
        "compression": stage.shape.compression,
    }


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _version(*argv: str) -> str:
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found[0] if found else "unknown"

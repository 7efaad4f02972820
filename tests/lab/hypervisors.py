# SPDX-License-Identifier: Apache-2.0
"""The QEMU and the libvirt of the lab: this machine's, or those of another release of Debian.

LAB_SUITE in the environment names the release, one of SUITES. Its QEMU and libvirtd come from a
tree in the cache (see trees.py); all else, libvirt's clients too, stays this machine's.
"""

import functools
import os
from pathlib import Path

from tests.lab.trees import Release
from tools.corpus import emulators

MACHINE = "bookworm"
SUITES = ("trixie", "sid")
_LIBVIRTD = "usr/sbin/libvirtd"
# libvirtd does not start without a firewall. Python runs the emulator that the lab gives it
_PACKAGES = f"{emulators.PACKAGES},libvirt-daemon,libvirt-daemon-driver-qemu,nftables,python3"
# Its /usr instead of this machine's, for libvirtd and the QEMUs that it starts alone. What libvirtd
# keeps and what guests use has the same path inside and outside.
_ENTER = 'mount --bind "$1" /usr && shift && exec "$@"'


def suite() -> str:
    """The release of Debian whose QEMU and libvirt the lab runs.

    :raises EmulatorError: LAB_SUITE names none.
    """
    name = os.environ.get("LAB_SUITE") or MACHINE
    if name not in (MACHINE, *SUITES):
        raise emulators.EmulatorError(f"LAB_SUITE={name} is none of {', '.join(SUITES)}")
    return name


@functools.cache
def emulator() -> emulators.Emulator:
    """Its QEMU.

    :raises EmulatorError: it is not to be had.
    """
    tree = _tree()
    return emulators.installed() if tree is None else emulators.in_tree(tree)


def qemu() -> tuple[str, ...]:
    """The start of QEMU's command line.

    :raises EmulatorError: it is not to be had.
    """
    return emulator().command


def libvirtd() -> list[str]:
    """The start of libvirtd's command line. It must run in a mount namespace of root's.

    :raises EmulatorError: it is not to be had.
    """
    tree = _tree()
    if tree is None:
        return ["libvirtd"]
    enter = ["unshare", "--mount", "--propagation", "private", "--", "/bin/sh", "-c", _ENTER, "sh"]
    return [*enter, str(tree / "usr"), "/usr/sbin/libvirtd"]


def libvirt_version() -> str:
    """:raises EmulatorError: it is not to be had."""
    tree = _tree()
    command = ("libvirtd",) if tree is None else emulators.loaded(tree, _LIBVIRTD)
    return emulators.version(command)


def _tree() -> Path | None:
    name = suite()
    return None if name == MACHINE else Release(name, _PACKAGES, f"/{_LIBVIRTD}").tree()

# SPDX-License-Identifier: Apache-2.0
"""Whether a security module of the kernel keeps guests from the relays' sockets.

It is looked at before a migration: QEMU would be refused in the midst of it.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_APPARMOR_RULES = (
    "etc/apparmor.d/abstractions/libvirt-qemu",
    "etc/apparmor.d/abstractions/libvirt-qemu.d/*",
    "etc/apparmor.d/local/abstractions/libvirt-qemu",
)
#: What a directory below /run gets from nobody in particular.
_COMMON_TYPES = ("var_run_t", "tmpfs_t", "unlabeled_t", "default_t")
_SECURITY_DRIVER = re.compile(r"^\s*security_driver\s*=\s*(.*)$", re.MULTILINE)
_FILE_RULE = re.compile(r'(owner\s+)?"?(?P<path>/[^\s"]*)"?\s+(?P<access>[a-zA-Z]+)\s*,')
_LABEL = "security.selinux"


def obstacle(sockets: Path, root: Path = Path("/")) -> str:
    """Why guests of this host cannot use sockets in that directory; empty if nothing is known that
    keeps them from it.

    :param root: where the host's files are.
    """
    if _unconfined(root):
        return ""
    if _read(root / "sys/module/apparmor/parameters/enabled").startswith("Y"):
        rules = list(_rules(root))
        # Without any, guests have other profiles, of which nothing is known
        if rules and not any(_allows(rule, f"{sockets}/migration/qemu") for rule in rules):
            return f"AppArmor has no rule for {sockets} in {_APPARMOR_RULES[-1]}"
    if _read(root / "sys/fs/selinux/enforce").strip() == "1":
        kind = _selinux_type(sockets)
        if kind in _COMMON_TYPES:
            return f"SELinux: {sockets} is of the type {kind}, in which guests have no sockets"
    return ""


def _unconfined(root: Path) -> bool:
    """Whether libvirt leaves its guests unconfined."""
    drivers = _SECURITY_DRIVER.findall(_read(root / "etc/libvirt/qemu.conf"))
    return bool(drivers) and re.findall(r'"(\w+)"', drivers[-1]) == ["none"]


def _rules(root: Path) -> Iterator[str]:
    """The lines that go into the profiles of guests, without comments."""
    for pattern in _APPARMOR_RULES:
        for path in root.glob(pattern):
            for line in _read(path).splitlines():
                yield line.partition("#")[0]


def _allows(rule: str, path: str) -> bool:
    """Whether a line of a profile lets a file be read and written. Source: apparmor.d(5)."""
    found = _FILE_RULE.match(rule.strip())
    if found is None or not {"r", "w"} <= set(found["access"]):
        return False
    pattern = re.escape(found["path"])
    for glob, meaning in ((r"\*\*", ".*"), (r"\*", "[^/]*"), (r"\?", "[^/]")):
        pattern = pattern.replace(glob, meaning)
    pattern = pattern.replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")
    return re.fullmatch(pattern, path) is not None


def _selinux_type(path: Path) -> str | None:
    with contextlib.suppress(OSError, IndexError):
        return os.getxattr(path, _LABEL).decode(errors="replace").rstrip("\0").split(":")[2]
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

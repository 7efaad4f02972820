# SPDX-License-Identifier: Apache-2.0
"""As whom QEMU runs on this host: who has to reach the sockets of relays, and make its own."""

import contextlib
import grp
import os
import pwd
import re
from pathlib import Path

from nova_dmigrate import exception

#: User and group of the service itself.
OWN = (-1, -1)

_CONFIGURATION = "etc/libvirt/qemu.conf"
#: Unless it is configured otherwise: with Debian and its relatives, with Fedora and its relatives.
_ACCOUNTS = ("libvirt-qemu", "qemu")
_SETTING = re.compile(r"""^\s*(user|group)\s*=\s*["']([^"']*)["']""", re.MULTILINE)


def owner(user: str, group: str, root: Path = Path("/")) -> tuple[int, int]:
    """Numbers of the user and group that QEMU's files are for; `OWN` where QEMU needs nothing.

    :param user, group: names or numbers; empty to look for them: in libvirt's configuration, then
        among the accounts that distributions have for it. Where there are none, QEMU runs as root.
    :param root: where the host's files are.
    :raises ConfigurationError: a name is none of this host's.
    """
    if not user and os.geteuid():
        return OWN  # who is not root can give nothing away
    settings = dict(_SETTING.findall(_read(root / _CONFIGURATION)))
    try:
        found = user or settings.get("user") or next(filter(_is_account, _ACCOUNTS), "root")
        uid, own_group = _user(found)
        named = group or (settings.get("group", "") if not user else "")
        gid = _group(named) if named else own_group
    except (KeyError, ValueError) as error:
        raise exception.ConfigurationError(
            reason=f"QEMU's user or group ([host]qemu_user, qemu_group, or /{_CONFIGURATION}):"
            f" {error.args[0]}"
        ) from error
    own = uid == os.geteuid() and gid in (-1, os.getegid())
    return OWN if own else (uid, gid)


def _user(name: str) -> tuple[int, int]:
    """Numbers of a user, and of its group (-1 if it has no account)."""
    number = _number(name)
    if number is None:
        account = pwd.getpwnam(name)
        return account.pw_uid, account.pw_gid
    with contextlib.suppress(KeyError):
        return number, pwd.getpwuid(number).pw_gid
    return number, -1


def _group(name: str) -> int:
    number = _number(name)
    return grp.getgrnam(name).gr_gid if number is None else number


def _number(name: str) -> int | None:
    """Of "+107" or "107", as libvirt has them; None for a name."""
    digits = name.removeprefix("+")
    return int(digits) if digits.isdigit() else None


def _is_account(name: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

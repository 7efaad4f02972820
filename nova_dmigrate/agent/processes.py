# SPDX-License-Identifier: Apache-2.0
"""The database servers that run in this guest, as /proc shows them.

A server may live in a chroot or a container: its paths are then its own. They are translated
through /proc/PID/root, which leads there from outside.

A process can call itself what it likes. What tells a server from one that only looks like it is
the account that runs it, as the kernel shows it to us: no namespace that a user makes changes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import posixpath
import pwd
import re
from collections.abc import Iterable

from nova_dmigrate import exception

_PROC = "/proc"
_PROGRAMS = ("mysqld", "mariadbd", "mysqld-debug", "mysqld_debug")
_LISTENING = 0x10000  # __SO_ACCEPTCON in /proc/net/unix
_MAX_LINKS = 16
_MAX_STRANGERS = 3  # so many are told of
# A line of /proc/net/unix: flags, inode, path. A path may hold line breaks, and so forge lines.
_SOCKET = re.compile(
    r"[0-9A-Fa-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) [0-9A-F]{4} [0-9A-F]{2} +([0-9]+) (.+)"
)


@dataclasses.dataclass(frozen=True)
class Selector:
    """Which servers are meant: all that are given must fit. None at all means every server.

    ``datadir`` and ``socket`` are paths as the server or as this process sees them. ``users``:
    names or numbers of the accounts that run servers; what runs as another is none.
    """

    pid: int | None = None
    datadir: str | None = None
    socket: str | None = None
    users: tuple[str, ...] = ("mysql",)


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """One running mysqld or mariadbd.

    ``start_time`` (clock ticks since boot) tells the process from a later one with its pid.
    ``executable``, ``datadir`` and ``socket`` are paths as the server sees them, ``root`` leads
    to its root directory. ``socket`` is None when it listens on none. ``uid`` is that of the
    account that runs it, as this process sees it.
    """

    pid: int
    start_time: int
    executable: str
    datadir: str
    root: str
    socket: str | None
    uid: int

    def path(self, path: str) -> str:
        """The way from here to a path that the server knows; links on it stay in its world.

        A relative path is relative to the data directory, where the server works.

        :raises OSError: if its links go in a circle.
        """
        return self.root + _follow(self.root, posixpath.join(self.datadir, path))

    @property
    def socket_path(self) -> str | None:
        """The way from here to its socket, None when it listens on none.

        :raises ServerError: if there is no way.
        """
        if self.socket is None:
            return None
        try:
            return self.path(self.socket)
        except OSError as error:
            raise exception.ServerError(
                server=self.socket, reason=error.strerror, code="gone"
            ) from error

    def inside(self, path: str) -> str:
        """A path out of one of the links of /proc/PID, as the server sees it."""
        return _inside(self.pid, path)

    @property
    def running(self) -> bool:
        """Whether it still runs, it and not another with the same pid."""
        try:
            return read_start_time(self.pid) == self.start_time
        except (OSError, ValueError):
            return False


def find_servers(selector: Selector | None = None) -> list[ServerProcess]:
    """The servers that fit, sorted by pid.

    :raises ServerNotFound: if there is none; it names those that look like one, but run as
        another user than the selector's.
    :raises PrivilegeError: if there is one that fits as far as can be seen, but the kernel does
        not let us look at it.
    """
    selector = selector or Selector()
    candidates = [selector.pid] if selector.pid is not None else _all_pids()
    users = user_ids(selector.users)
    servers, strangers = [], []
    refused = None
    for pid in candidates:
        uid = _server_uid(pid)
        if uid is None:
            continue
        if uid not in users:
            strangers.append((pid, uid))
            continue
        try:
            server = _inspect(pid, uid)
        except exception.PrivilegeError as error:
            refused = error
            continue
        if server is not None and _fits(server, selector):
            servers.append(server)
    if not servers and refused is not None:
        raise refused
    if not servers:
        raise exception.ServerNotFound(
            reason="; ".join([_what_was_sought(selector), *_told(strangers)])
        )
    return servers


def user_ids(users: Iterable[str]) -> frozenset[int]:
    """The numbers of those accounts that there are."""
    uids = set()
    for user in users:
        if user.isdecimal():
            uids.add(int(user))
            continue
        with contextlib.suppress(KeyError):
            uids.add(pwd.getpwnam(user).pw_uid)
    return frozenset(uids)


def read_start_time(pid: int) -> int:
    """When the process was started, in clock ticks since boot."""
    with open(f"{_PROC}/{pid}/stat", "rb") as file:
        # The name in parentheses may hold anything, spaces and parentheses too.
        return int(file.read().rpartition(b")")[2].split()[19])


def parse_sockets(text: str, inodes: set[int]) -> list[str]:
    """Paths of those of ``inodes`` that listen, from the text of /proc/PID/net/unix."""
    paths = []
    for line in text.split("\n"):
        match = _SOCKET.fullmatch(line)
        if match and int(match[1], 16) & _LISTENING and int(match[2]) in inodes:
            paths.append(match[3])
    return paths


def process_error(pid: int, error: OSError) -> exception.AgentError:
    """What it means that something of a server in /proc could not be read."""
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return exception.ServerNotFound(reason=f"process {pid} has ended")
    if error.errno in (errno.EPERM, errno.EACCES):
        return exception.PrivilegeError(
            reason=f"process {pid} cannot be inspected ({error.strerror}); "
            "the agent needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
        )
    return exception.ServerError(server=pid, reason=f"/proc tells too little: {error.strerror}")


def _all_pids() -> list[int]:
    return sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())


def _told(strangers: Iterable[tuple[int, int]]) -> list[str]:
    """What to do about processes (pid, uid) that look like servers."""
    told = []
    for pid, uid in list(strangers)[:_MAX_STRANGERS]:
        try:
            user = pwd.getpwuid(uid).pw_name
        except KeyError:
            user = str(uid)
        told.append(
            f"process {pid} looks like a server but runs as user {user}: "
            "if that is right, name it in [agent]server_users"
        )
    return told


def _server_uid(pid: int) -> int | None:
    """The account that runs what looks like a server; None if it does not, or is gone."""
    try:
        with open(f"{_PROC}/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
        if name not in _PROGRAMS and not _runs_program(pid):
            return None
        # Not the owner of /proc/PID: that is root once a process has given up privileges
        with open(f"{_PROC}/{pid}/status", encoding="utf-8", errors="replace") as file:
            match = re.search(r"^Uid:\s*([0-9]+)", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def _inspect(pid: int, uid: int) -> ServerProcess | None:
    """The server with that pid; None if it is gone."""
    try:
        executable = os.readlink(f"{_PROC}/{pid}/exe").replace(" (deleted)", "")
        root = f"{_PROC}/{pid}/root"
        return ServerProcess(
            pid=pid,
            start_time=read_start_time(pid),
            executable=_inside(pid, executable),
            datadir=_inside(pid, os.readlink(f"{_PROC}/{pid}/cwd")),
            root=root,
            socket=_socket(pid),
            uid=uid,
        )
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise process_error(pid, error) from error
        return None


def _runs_program(pid: int) -> bool:
    """Whether the program itself has a server's name: the process may have renamed itself."""
    try:
        executable = os.readlink(f"{_PROC}/{pid}/exe")
    except OSError:
        return False
    return posixpath.basename(executable.replace(" (deleted)", "")) in _PROGRAMS


def _inside(pid: int, path: str) -> str:
    """A path out of one of the links of /proc/PID, as the process sees it.

    Where the process lives in a chroot of ours the link shows our path; where it has mounts of
    its own, its own.
    """
    root = os.readlink(f"{_PROC}/{pid}/root")
    if root != "/" and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path


def _socket(pid: int) -> str | None:
    """The socket on which clients reach the server."""
    inodes = set()
    for name in os.listdir(f"{_PROC}/{pid}/fd"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"{_PROC}/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
        if match:
            inodes.add(int(match[1]))
    with open(f"{_PROC}/{pid}/net/unix", encoding="utf-8", errors="replace") as file:
        paths = parse_sockets(file.read(), inodes)
    # MySQL 8 also listens for its X protocol, which is of no use to us.
    ordinary = [path for path in paths if "mysqlx" not in posixpath.basename(path)]
    return ordinary[0] if ordinary else None


def _fits(server: ServerProcess, selector: Selector) -> bool:
    return (
        (selector.datadir is None or _same(server, server.datadir, selector.datadir))
        and (
            selector.socket is None
            or (server.socket is not None and _same(server, server.socket, selector.socket))
        )
        and (selector.pid is None or server.pid == selector.pid)
    )


def _same(server: ServerProcess, actual: str, wanted: str) -> bool:
    """Whether two paths, the first the server's, are the same by name or lead to one file."""
    if posixpath.normpath(posixpath.join(server.datadir, actual)) == posixpath.normpath(wanted):
        return True
    try:
        return os.path.samefile(server.path(actual), wanted)
    except OSError:
        return False


def _follow(root: str, path: str) -> str:
    """Resolve the links of ``path`` as if ``root`` were the root directory.

    The kernel resolves an absolute link from our root, whatever way we came.
    """
    done, rest, links = "", path.split("/"), 0
    while rest:
        name = rest.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            done = posixpath.dirname(done).rstrip("/")
            continue
        try:
            target = os.readlink(f"{root}{done}/{name}")
        except OSError:
            done += "/" + name
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.startswith("/"):
            done = ""
        rest = target.split("/") + rest
    return done or "/"


def _what_was_sought(selector: Selector) -> str:
    named = {"pid": selector.pid, "datadir": selector.datadir, "socket": selector.socket}
    given = [f"{name} {value}" for name, value in named.items() if value is not None]
    if not given:
        return "neither mysqld nor mariadbd runs here"
    return "none runs here with " + " and ".join(given)

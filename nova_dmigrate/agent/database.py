# SPDX-License-Identifier: Apache-2.0
"""A connection to one database server, over its local socket, as a user who may do little.

MySQL 5.6 to 9 and MariaDB 10.5 to 11 are one kind of server to the rest of the agent; where they
differ is said here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket as sockets
import struct
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import pymysql  # type: ignore[import-untyped]
import pymysql.cursors  # type: ignore[import-untyped]

from nova_dmigrate import exception

DEFAULT_USER = "nova_dmigrate"
# Global variables that are set as text; all others are numbers
TEXTS = ("innodb_buffer_pool_filename",)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_USER = re.compile(r"[A-Za-z0-9_]{1,32}")
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
# Ways to log in that hand the password over as it is, whatever the server keeps of it
_CLEARTEXT = ("mysql_clear_password", "dialog")
# At most: four requests at a time, what is done every second, the hot pages (two), the command line
_CONNECTIONS = 8
_NO_PLUGIN = 2059  # CR_AUTH_PLUGIN_CANNOT_LOAD
_VERSION = re.compile(r"(?:5\.5\.5-)?(\d+)\.(\d+)(?:\.(\d+))?")
# A packet: length (3 bytes), number, then protocol version 10 and the server's name for itself
_GREETING = re.compile(rb".{3}\0\x0a([^\0]{1,256})\0", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Login:
    """How to reach a server. ``user`` without a password is known by who runs the agent.

    ``timeout``: seconds for connecting, and for each statement. ``uids``: accounts that may run
    the server, besides root; nothing is said to what another account runs.
    """

    socket: str
    user: str = DEFAULT_USER
    password: str = ""
    timeout: float = 5.0
    uids: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class PoolStatus:
    """The buffer pool: sizes in pages of ``page_bytes``."""

    page_bytes: int
    total: int
    data: int
    dirty: int

    @property
    def dirty_share(self) -> float:
        """Dirty pages as a share of those that hold data, as the server's settings mean it."""
        return min(1.0, self.dirty / self.data) if self.data > 0 else 0.0

    @property
    def filled_share(self) -> float:
        return min(1.0, self.data / self.total) if self.total > 0 else 0.0


class Database:
    """One server. Not for several threads at once.

    :ivar flavour: ``mysql`` or ``mariadb``.
    :ivar version: major, minor, patch.
    :ivar pid: the server's process, None where it cannot be seen.
    """

    def __init__(self, login: Login, connection: Any) -> None:
        self.login = login
        self._connection = connection
        text = str(connection.get_server_info())
        with self._translated():
            comment = self._rows("SELECT @@version_comment, @@version")[0]
        self.server_version = str(comment[1] or text)
        self.flavour, self.version = parse_version(f"{text} {comment[1]} {comment[0]}")
        self.pid = _peer_pid(connection)

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(pymysql.MySQLError, OSError):
            self._connection.close()

    def variables(self, names: Sequence[str]) -> dict[str, str]:
        """Global variables; those that this server does not have are left out."""
        return self._named("SHOW GLOBAL VARIABLES", names)

    def status(self, names: Sequence[str]) -> dict[str, str]:
        """Global status; names that this server does not have are left out."""
        return self._named("SHOW GLOBAL STATUS", names)

    def set_global(self, name: str, value: str) -> None:
        """Set a global variable: a number, or one of `TEXTS`.

        :raises ServerError: if the server refuses; ``code`` is ``privilege`` when it is because
            of the user.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a variable")
        if name in TEXTS:
            literal, arguments = "%s", [value]
        else:
            number = float(value)
            literal = str(int(number)) if number.is_integer() else f"{number:.6f}"
            arguments = None
        with self._translated():
            with self._connection.cursor() as cursor:
                cursor.execute(f"SET GLOBAL {name} = {literal}", arguments)

    def may_set_globals(self) -> bool:
        """Whether this user's own grants allow setting InnoDB's variables."""
        with self._translated():
            text = " ".join(str(row[0]) for row in self._rows("SHOW GRANTS")).upper()
        granted = text.replace("`", "").replace(", ", ",").replace(" ON *.*", ",ON *.*").split(",")
        names = {"SUPER", "SYSTEM_VARIABLES_ADMIN", "ALL PRIVILEGES"}
        return any(word.rpartition("GRANT ")[2].strip() in names for word in granted)

    def pool(self) -> PoolStatus:
        """How full and how dirty the buffer pool is. Costs no more than SHOW STATUS."""
        names = {
            "Innodb_page_size": "page_bytes",
            "Innodb_buffer_pool_pages_total": "total",
            "Innodb_buffer_pool_pages_data": "data",
            "Innodb_buffer_pool_pages_dirty": "dirty",
        }
        status = self.status(list(names))
        if len(status) < len(names):
            raise self._error("it does not tell the state of its buffer pool: is InnoDB off?")
        return PoolStatus(**{names[name]: int(value) for name, value in status.items()})

    def latency(self) -> float:
        """Seconds that a statement takes which does nothing."""
        began = time.monotonic()
        with self._translated():
            self._rows("SELECT 1")
        return time.monotonic() - began

    def _named(self, statement: str, names: Sequence[str]) -> dict[str, str]:
        if not names:
            return {}
        marks = ", ".join(["%s"] * len(names))
        with self._translated():
            rows = self._rows(f"{statement} WHERE Variable_name IN ({marks})", list(names))
        lower = {name.lower(): name for name in names}
        return {
            lower[str(row[0]).lower()]: str(row[1]) for row in rows if str(row[0]).lower() in lower
        }

    def _rows(self, statement: str, arguments: Sequence[Any] | None = None) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, arguments)
            return list(cursor.fetchall())

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (pymysql.MySQLError, OSError) as error:
            raise self._error(_sentence(error), _code(error)) from error

    def _error(self, reason: str, code: str = "failed") -> exception.ServerError:
        return exception.ServerError(server=self.login.socket, reason=reason, code=code)


def connect(login: Login) -> Database:
    """Connect to a server.

    :raises ServerError: if it cannot be reached, or does not let us in, or another account than
        ``login.uids`` listens there (``code`` is ``login``).
    """
    reached = _reach(login)
    try:
        connection = pymysql.Connection(
            defer_connect=True,
            user=login.user,
            password=login.password,
            charset="utf8",
            autocommit=True,
            read_timeout=login.timeout,
            write_timeout=login.timeout,
            cursorclass=pymysql.cursors.Cursor,
            # Nothing the server could ask for is read from our files
            local_infile=False,
            read_default_file=None,
            auth_plugin_map=dict.fromkeys(_CLEARTEXT, _Refused),
            # Nobody is between the two ends of the socket; a context for TLS takes longer to make
            # than all that is asked
            ssl_disabled=True,
        )
        # What pymysql says of a UNIX socket that it has opened itself
        connection._secure = True
        connection.connect(reached)
    except Exception as error:  # noqa: BLE001 - the library is not made for other than servers
        reached.close()
        raise exception.ServerError(
            server=login.socket, reason=_sentence(error), code=_code(error)
        ) from error
    try:
        return Database(login, connection)
    except BaseException:
        connection.close()
        raise


def greet(login: Login) -> tuple[str, tuple[int, int, int]]:
    """Flavour and version of a server, which it tells whoever connects, before any login.

    :raises ServerError: if it cannot be reached, or tells something else.
    """
    try:
        with _reach(login) as connection:
            greeting = connection.recv(4096)
    except OSError as error:
        raise exception.ServerError(
            server=login.socket, reason=_sentence(error), code="gone"
        ) from error
    match = _GREETING.match(greeting)
    if match is None:
        raise exception.ServerError(
            server=login.socket, reason="it does not greet as MySQL does", code="failed"
        )
    return parse_version(match[1].decode("utf-8", "replace"))


def _reach(login: Login) -> sockets.socket:
    """A connection to the server's socket, on which nothing was said yet.

    What was found out about process and path may be true no more, or may have been made up by
    another user of this guest; who listens at the other end is the kernel's word.
    """
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connection.settimeout(login.timeout)
        connection.connect(login.socket)
        uid = _peer(connection)[1]
    except OSError as error:
        connection.close()
        raise exception.ServerError(
            server=login.socket, reason=_sentence(error), code="gone"
        ) from error
    # Socket activation: the service manager, root, has made the socket, not the server
    if uid != 0 and uid not in login.uids:
        connection.close()
        raise exception.ServerError(
            server=login.socket,
            reason=f"user {uid} listens there, as whom no database server runs",
            code="login",
        )
    return connection


class _Refused:
    """In the place of a way to log in that tells the password to the other side."""

    def __init__(self, connection: object) -> None:
        pass

    def authenticate(self, packet: object) -> None:
        raise pymysql.err.OperationalError(_NO_PLUGIN, "it asks for the password in the clear")


def parse_version(text: str) -> tuple[str, tuple[int, int, int]]:
    """Flavour and version from what a server calls itself, e.g. ``5.5.5-10.11.6-MariaDB-0+deb``.

    MariaDB's "5.5.5-" in front is there for old replicas.
    """
    match = _VERSION.match(text)
    version = (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)
    return ("mariadb" if "mariadb" in text.lower() else "mysql"), version


def grants(flavour: str, version: Sequence[int], user: str = DEFAULT_USER) -> list[str]:
    """Statements that make the agent's SQL user, with no more than it needs.

    PASSWORD is to be replaced. MySQL before 8, and MariaDB to this day, have no privilege finer
    than SUPER for InnoDB's variables.
    """
    if not _USER.fullmatch(user):
        raise ValueError(f"{user!r} is not usable as the name of an SQL user")
    account = f"'{user}'@'localhost'"
    limit = f"WITH MAX_USER_CONNECTIONS {_CONNECTIONS}"
    if flavour == "mariadb":
        return [
            f"CREATE USER {account} IDENTIFIED BY 'PASSWORD' {limit}",
            f"GRANT SUPER ON *.* TO {account}",
        ]
    if tuple(version) >= (8, 0):
        return [
            f"CREATE USER {account} IDENTIFIED BY 'PASSWORD' {limit}",
            f"GRANT SYSTEM_VARIABLES_ADMIN ON *.* TO {account}",
        ]
    return [
        f"CREATE USER {account} IDENTIFIED BY 'PASSWORD'",
        f"GRANT SUPER ON *.* TO {account} {limit}",
    ]


def _peer(connection: sockets.socket) -> tuple[int, int]:
    """Process and user that listen at the other end."""
    raw = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(raw)
    return pid, uid


def _peer_pid(connection: Any) -> int | None:
    """The process that listens at the other end of the socket; None in another PID namespace."""
    raw = getattr(connection, "_sock", None)
    if raw is None:
        return None
    try:
        pid = _peer(raw)[0]
    except OSError:
        return None
    # Socket activation: the service manager has made the socket, not the server
    return pid if pid > 1 and os.path.exists(f"/proc/{pid}") else None


def _sentence(error: BaseException) -> str:
    """What the server or the library has said, without its number."""
    if isinstance(error, pymysql.MySQLError) and len(error.args) > 1:
        return str(error.args[1])
    return str(error) or type(error).__name__


# Numbers of MySQL's errors; the client library's begin at 2000
_CODES = {
    **dict.fromkeys((1044, 1045, 1251, 1698, 1862, _NO_PLUGIN), "login"),
    **dict.fromkeys((1142, 1227, 3814), "privilege"),
    1238: "read-only",
    **dict.fromkeys((2002, 2003, 2006, 2013), "gone"),
}


def _code(error: BaseException) -> str:
    if isinstance(error, OSError):
        return "gone"
    return _CODES.get(error.args[0] if error.args else 0, "failed")

# SPDX-License-Identifier: Apache-2.0
"""Database servers on block devices of this machine, unmodified, under load.

A server runs in the mount namespace of its volume, as one in a container would.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from tests.lab import processes
from tests.lab.loop import BLOCK, DatabaseError, LoopVolume, run

AnyServer = TypeVar("AnyServer", bound="Server")


def available() -> str | None:
    """Why databases cannot run on this machine, None if they can."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        return "needs root and loop devices"
    for program in ("mariadbd", "sysbench"):
        if shutil.which(program, path="/usr/sbin:/usr/bin") is None:
            return f"{program} is not installed"
    return None


class Server:
    """A private server with its data on a volume: what all kinds have in common.

    ``datadir``, ``socket``: as they are seen from here (in the namespace of the volume);
    ``seen_datadir``, ``seen_socket``: as the server itself sees them.
    """

    # What InnoDB's list of tablespaces is called
    TABLESPACES = "innodb_sys_tablespaces"
    # Attributes of tables whose pages are on the volume otherwise than in memory, by why
    SPECIAL: Mapping[str, str] = {}
    # Of those the ones whose first page is on the volume as it is in memory all the same
    PLAIN_FIRST_PAGE: Collection[str] = ()

    def __init__(self, directory: Path, volume: LoopVolume) -> None:
        self._directory = directory
        self._volume = volume
        self._log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.datadir = volume.mountpoint / "data"
        self.socket = directory / "server.sock"
        # The server gives up root before it reads its keys and binds its socket.
        self._user = pwd.getpwnam("mysql")
        os.chown(directory, self._user.pw_uid, self._user.pw_gid)

    @property
    def seen_datadir(self) -> Path:
        return self.datadir

    @property
    def seen_socket(self) -> Path:
        return self.socket

    def install(self) -> None:
        """Make the data directory."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        """How to start the server."""
        raise NotImplementedError

    def _make_datadir(self) -> None:
        run([*self._volume.enter, "mkdir", str(self.datadir)])
        run([*self._volume.enter, "chown", "mysql:mysql", str(self.datadir)])

    def start(self, timeout: float = 60) -> None:
        """Start the server and wait until it answers."""
        with open(self._log, "ab") as log:
            self._process = processes.spawn(
                [*self._volume.enter, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(DatabaseError):
                self.sql("SELECT 1")
                return
            time.sleep(0.1)
        self.stop()
        raise DatabaseError(f"the server does not start:\n{self._log.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Shut it down."""
        if self._process is not None:
            processes.end(self._process, [(signal.SIGTERM, 30)])
            self._process = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            processes.end(self._process)
            self._process = None

    def sql(self, text: str, database: str = "") -> str:
        """Run statements as root; the result as tab-separated lines without headings."""
        return run(
            ["mariadb", "--no-defaults", f"--socket={self.socket}", "--user=root", "--batch"]
            + ["--skip-column-names", f"--execute={text}", database],
        )

    @contextlib.contextmanager
    def session(self) -> Iterator[TextIO]:
        """A client of its own: write statements, and flush."""
        process = processes.spawn(
            ["mariadb", "--no-defaults", f"--socket={self.socket}", "--user=root", "--batch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdin is not None
            yield process.stdin
        finally:
            processes.end(process)

    def sysbench(self, command: str, *options: str, test: str = "oltp_read_write") -> list[str]:
        """The command line of sysbench against this server (database ``sbtest``)."""
        return [
            "sysbench",
            test,
            "--db-driver=mysql",
            f"--mysql-socket={self.socket}",
            "--mysql-user=root",
            *options,
            command,
        ]

    def fill(self, tables: int, rows: int) -> None:
        """Make sysbench's tables."""
        self.sql("CREATE DATABASE IF NOT EXISTS sbtest")
        run(self.sysbench("prepare", f"--tables={tables}", f"--table-size={rows}"))

    def dirty_pages(self) -> int:
        return int(self.sql("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_dirty'").split()[1])

    def flush(self, timeout: float = 60) -> None:
        """Have all dirty pages written, at once."""
        names = ("innodb_max_dirty_pages_pct", "innodb_max_dirty_pages_pct_lwm")
        names += ("innodb_io_capacity_max", "innodb_io_capacity")
        before = self.sql("SELECT " + ", ".join(f"@@{name}" for name in names)).split()
        self.sql("SET GLOBAL innodb_max_dirty_pages_pct_lwm=0, innodb_max_dirty_pages_pct=0")
        self.sql("SET GLOBAL innodb_io_capacity_max=50000, innodb_io_capacity=50000")
        deadline = time.monotonic() + timeout
        while self.dirty_pages():
            if time.monotonic() > deadline:
                raise DatabaseError("dirty pages are not written")
            time.sleep(0.1)
        for name, value in zip(reversed(names), reversed(before), strict=True):
            self.sql(f"SET GLOBAL {name}={value}")

    @contextlib.contextmanager
    def load(self, *options: str, test: str = "oltp_read_write") -> Iterator[None]:
        """sysbench runs as long as the context does."""
        argv = self.sysbench("run", "--time=0", *options, test=test)
        process = processes.spawn(argv, stdout=subprocess.DEVNULL)
        try:
            yield
            if process.poll() is not None:
                raise DatabaseError("sysbench has ended early")
        finally:
            processes.end(process)


class MariaDB(Server):
    """This machine's MariaDB.

    ``options``: of mariadbd, without the leading dashes. Its plugin for encryption has a key.
    """

    SPECIAL = {
        "page-compressed": "PAGE_COMPRESSED=1",
        "encrypted": "ENCRYPTED=YES",
        "compressed": "ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=8",
    }

    def __init__(
        self, directory: Path, volume: LoopVolume, options: Sequence[str] = (), pool: str = "128M"
    ) -> None:
        super().__init__(directory, volume)
        self._pool = pool
        self._extra = [f"--{option}" for option in options]
        keys = directory / "keys"
        keys.write_text(f"1;{secrets.token_hex(32)}\n")
        os.chown(keys, self._user.pw_uid, self._user.pw_gid)

    def install(self) -> None:
        self._make_datadir()
        run(
            [*self._volume.enter, "mariadb-install-db", "--no-defaults", "--user=mysql"]
            + [f"--datadir={self.datadir}", "--auth-root-authentication-method=normal"]
            + ["--skip-test-db", f"--tmpdir={self._directory}", *self._extra]
        )

    def _command(self) -> list[str]:
        return ["/usr/sbin/mariadbd", "--no-defaults", "--user=mysql", *self._options()]

    def _options(self) -> list[str]:
        directory = self.seen_socket.parent
        return [
            f"--datadir={self.seen_datadir}",
            f"--socket={self.seen_socket}",
            f"--pid-file={directory / 'server.pid'}",
            # Not shared: one that starts removes what look like left temporary tables.
            f"--tmpdir={directory}",
            "--skip-networking",
            f"--innodb-buffer-pool-size={self._pool}",
            "--plugin-load-add=file_key_management",
            f"--file-key-management-filename={directory / 'keys'}",
            *self._extra,
        ]


@contextlib.contextmanager
def mariadb(
    megabytes: int = 1024, kind: str = "ext4", options: Sequence[str] = (), pool: str = "128M"
) -> Iterator[tuple[MariaDB, LoopVolume]]:
    """A running MariaDB with an empty data directory on a volume of its own."""
    with running(
        lambda directory, volume: MariaDB(directory, volume, options, pool), megabytes, kind
    ) as made:
        yield made


@contextlib.contextmanager
def running(
    make: Callable[[Path, LoopVolume], AnyServer], megabytes: int = 1024, kind: str = "ext4"
) -> Iterator[tuple[AnyServer, LoopVolume]]:
    """The server that ``make`` makes, installed and started on a volume of its own."""
    with processes.workspace() as directory:
        os.chmod(directory, 0o755)
        with LoopVolume(directory, megabytes, kind) as volume:
            server = make(directory, volume)
            server.install()
            server.start()
            try:
                yield server, volume
            finally:
                server.stop()


def process_pages(pid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The guest pages of a process's writable private memory, sorted, and their addresses.

    Written anew here, so that what the agent finds is not checked by its own means.
    """
    guest, address = [], []
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            start, end = (int(bound, 16) for bound in span.split("-"))
            if permissions != "rw-p":
                continue
            raw = os.pread(pagemap.fileno(), (end - start) // BLOCK * 8, start // BLOCK * 8)
            entries = np.frombuffer(raw, np.uint64)
            present = np.flatnonzero(entries >> np.uint64(63))
            guest.append((entries[present] & np.uint64((1 << 55) - 1)).astype(np.int64))
            address.append(start + present * BLOCK)
    found = np.concatenate(guest)
    order = np.argsort(found)
    return found[order], np.concatenate(address)[order]


def read_pages(pid: int, guest: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Contents of a process's memory by guest page (u32 (n,)): u8 (n, 4096).

    A page that is the process's no more comes out as one that nothing equals.
    """
    known, address = process_pages(pid)
    content = np.empty((guest.size, BLOCK), np.uint8)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for row, page in enumerate(guest.astype(np.int64).tolist()):
            at = int(np.searchsorted(known, page))
            if at < known.size and known[at] == page:
                os.preadv(memory.fileno(), [memoryview(content[row])], int(address[at]))
            else:
                content[row] = np.frombuffer(secrets.token_bytes(BLOCK), np.uint8)
    return content


def equal_share(
    pid: int, volume: LoopVolume, guest: NDArray[np.uint32], block: NDArray[np.uint32]
) -> float:
    """Share of pages whose bytes in memory are those of their block at this moment."""
    memory = read_pages(pid, guest)
    return float((memory == volume.read_blocks(block)).all(axis=1).mean())

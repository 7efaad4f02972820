# SPDX-License-Identifier: Apache-2.0
"""A ledger of acknowledged commits, kept by a client, against which the database is checked.

The client inserts and updates rows at a modest rate. Into a file it writes what it is about to do,
and again when the server has acknowledged the commit. What was acknowledged must be in the table at
the end. What was not may be there: its connection broke before the answer came.

    with Ledger(server, directory) as ledger:
        ...                                     # migrate
    outcome = ledger.check()                    # outcome.lost must be 0

A line of the file is `try SEQUENCE ROW VERSION CHECKSUM` or `ack SEQUENCE TIME`, times as
time.monotonic() tells them.
"""

import dataclasses
import hashlib
import json
import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql

from tests.lab.demo.clients import (
    Client,
    ClientError,
    Server,
    parser,
    server_of,
    until_asked_to_end,
)

_BODY_BYTES = 120  # hexadecimal digits are stored
_RETRY = 0.2  # seconds
_READY_PATIENCE = 60.0
_TABLE = "ledger.entries"


@dataclasses.dataclass(frozen=True)
class LedgerCheck:
    """``acknowledged``: commits; ``lost``: those of them that the table does not have;
    ``wrong``: rows that are not as any commit has left them.
    """

    acknowledged: int
    lost: int
    wrong: int

    @property
    def ok(self) -> bool:
        return self.acknowledged > 0 and self.lost == 0 and self.wrong == 0


class Ledger(Client):
    """The client at work; ``check`` it once it has been stopped."""

    def __init__(self, server: Server, directory: Path, rate: float = 10.0) -> None:
        """:param directory: for the ledger's file.
        :param rate: commits a second, at most.
        :raises ClientError: it has no first commit acknowledged in time.
        """
        self.file = directory / "ledger"
        self._server = server
        log = directory / "ledger.log"
        with open(log, "wb") as errors:
            process = server.start_module(
                __name__, "write", self.file, "--rate", rate, stdout=errors, stderr=errors
            )
        super().__init__(process, log)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def acknowledged(self) -> int:
        """How many commits have been so far."""
        return self.file.read_bytes().count(b"\nack ")

    def check(self) -> LedgerCheck:
        """Compare the table with the file.

        :raises ClientError: the table cannot be read.
        """
        return LedgerCheck(**self._server.ask_module(__name__, "check", self.file))

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_PATIENCE
        while not self.file.exists() or b"ack" not in self.file.read_bytes():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ClientError(f"no commit is acknowledged: {self.last_words()}")
            time.sleep(0.05)


class _Writer:
    """Commits one change after the other."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "a", buffering=1)  # noqa: SIM115 - as long as the process lives
        self._sequence = 0
        self._next_row = 1
        # Row: version that was tried last. Only of rows whose insertion was acknowledged
        self._versions: dict[int, int] = {}

    def commit_one(self, cursor: Any) -> None:
        """:raises pymysql.err.Error: it may have been committed, or not."""
        self._sequence += 1
        body = secrets.token_hex(_BODY_BYTES)
        if self._sequence % 2 or not self._versions:
            row, version = self._next_row, 0
            self._next_row += 1
            statement = f"INSERT INTO {_TABLE} (version, body, id) VALUES (%s, %s, %s)"
        else:
            row = random.choice(list(self._versions))
            version = self._versions[row] = self._versions[row] + 1
            statement = f"UPDATE {_TABLE} SET version = %s, body = %s WHERE id = %s"
        self._file.write(f"try {self._sequence} {row} {version} {_checksum(body)}\n")
        cursor.execute(statement, (version, body, row))
        self._file.write(f"ack {self._sequence} {time.monotonic():.6f}\n")
        self._versions.setdefault(row, version)


def write(server: Server, file: Path, rate: float, ended: threading.Event) -> None:
    """Commit until asked to end, whatever becomes of the connection."""
    writer = _Writer(file)
    while not ended.is_set():
        try:
            with server.connect() as connection, connection.cursor() as cursor:
                cursor.execute("CREATE DATABASE IF NOT EXISTS ledger")
                cursor.execute(
                    f"CREATE TABLE IF NOT EXISTS {_TABLE} (id INT PRIMARY KEY,"
                    " version INT NOT NULL, body VARCHAR(255) NOT NULL) CHARSET latin1"
                )
                while not ended.wait(1 / rate):
                    writer.commit_one(cursor)
        except (pymysql.err.Error, OSError) as error:
            print(f"{time.monotonic():.3f} {error!r}", file=sys.stderr, flush=True)
            ended.wait(_RETRY)


def check(server: Server, file: Path) -> LedgerCheck:
    """Compare the table with the file. The client may be at work meanwhile.

    :raises pymysql.err.Error: the table cannot be read.
    """
    before = file.read_text()
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT id, version, body FROM {_TABLE}")
        table = {row: (version, _checksum(body)) for row, version, body in cursor.fetchall()}
    tries: dict[str, tuple[int, int]] = {}
    checksums: dict[tuple[int, int], str] = {}
    for line in _lines(file.read_text(), "try"):
        sequence, row, version, checksum = line
        tries[sequence] = change = int(row), int(version)
        checksums[change] = checksum
    acknowledged = [tries[sequence] for sequence, _ in _lines(before, "ack")]
    nothing = (-1, "")
    return LedgerCheck(
        acknowledged=len(acknowledged),
        lost=sum(table.get(row, nothing)[0] < version for row, version in acknowledged),
        wrong=sum(
            checksums.get((row, version)) != checksum for row, (version, checksum) in table.items()
        ),
    )


def _lines(text: str, kind: str) -> Iterator[list[str]]:
    # The last line may not be whole yet
    for line in text[: text.rfind("\n") + 1].splitlines():
        found, *rest = line.split()
        if found == kind:
            yield rest


def _checksum(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()


def main() -> None:
    made = parser("Keep a ledger of acknowledged commits, or check a database against it.")
    made.add_argument("--rate", type=float, default=10.0)
    made.add_argument("what", choices=("write", "check"))
    made.add_argument("file", type=Path)
    arguments = made.parse_args()
    server = server_of(arguments)
    if arguments.what == "check":
        print(json.dumps(dataclasses.asdict(check(server, arguments.file))))
    else:
        write(server, arguments.file, arguments.rate, until_asked_to_end())


if __name__ == "__main__":
    main()

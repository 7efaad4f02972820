# SPDX-License-Identifier: Apache-2.0
"""Questions to a database server, asked from among its clients, in whose network it is."""

import json
import subprocess
import time

import pymysql

from tests.lab.demo.clients import ClientError, Server, parser, server_of
from tests.lab.demo.tables import SCHEMAS

#: Seconds that a statement may take: the check of a table reads all of it.
_PATIENCE = 1800
#: And the question of a state, which may be lost with a server that is just being started anew.
_SHORT = 30
_LOADED = "SHOW STATUS LIKE 'Innodb_buffer_pool_load_status'"


def rows(server: Server, statement: str, patience: int = _PATIENCE) -> list[list[str]]:
    """What a statement answers.

    :param patience: seconds that the server may take.
    :raises ClientError: the server does not, or refuses.
    """
    try:
        found: list[list[str]] = server.ask_module(
            __name__, f"--patience={patience}", statement, timeout=2 * patience
        )
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"{statement}: {error}") from error
    return found


def table_errors(server: Server) -> list[str]:
    """What is wrong with the tables, as CHECK TABLE EXTENDED says.

    :raises ClientError: the server does not say.
    """
    checked = rows(server, f"CHECK TABLE {_tables(server)} EXTENDED")
    return ["\t".join(row) for row in checked if row[2:] != ["status", "OK"]]


def checksums(server: Server) -> dict[str, str]:
    """Of all that is in each table, by its name; not of the ledger's, which checks each row itself
    and changes all the time.

    :raises ClientError: the server does not say.
    """
    found = rows(server, f"CHECKSUM TABLE {_tables(server)}")
    return {row[0]: row[1] for row in found if not row[0].startswith("ledger.")}


def wait_until_filled(server: Server) -> None:
    """Wait until the server answers, and has filled its pool by its list of pages.

    :raises ClientError: it has not in time.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            ((_, status),) = rows(server, _LOADED, _SHORT)
            if "completed" in status:
                return
            error = ClientError(f"the buffer pool is not filled: {status}")
        except ClientError as failed:
            error = failed
        if time.monotonic() > deadline:
            raise error
        time.sleep(2)


def _tables(server: Server) -> str:
    """Names of the tables that are checked, as statements have them."""
    names = rows(
        server,
        "SELECT CONCAT(table_schema, '.', table_name) FROM information_schema.tables"
        f" WHERE table_type = 'BASE TABLE' AND table_schema IN ({SCHEMAS})",
    )
    return ", ".join(name for (name,) in names)


def main() -> None:
    made = parser("Print what a server answers to a statement.")
    made.add_argument("statement")
    made.add_argument("--patience", type=int, required=True, help="seconds for the answer")
    arguments = made.parse_args()
    server = server_of(arguments)
    connection = pymysql.connect(
        host=server.host,
        user=server.user,
        password=server.password,
        connect_timeout=10,
        read_timeout=arguments.patience,
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(arguments.statement)
        print(json.dumps([list(map(str, row)) for row in cursor.fetchall()]))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The MariaDB in which OpenStack's services keep what they know: this machine's own program, with
a directory and a port of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import pymysql

from tests.lab.openstack.service import Services

NAME = "mariadb"
USER = "openstack"
# Nothing of it shall outlive the lab
_IN_A_HURRY = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--skip-log-bin",
    "--innodb-log-file-size=64M",
)


class Database:
    """A server, and its databases."""

    def __init__(self, services: Services, directory: Path, port: int, password: str) -> None:
        """:param services: its own.
        :param directory: for its data.
        :param password: of the user of all services.
        """
        self.directory = directory
        self._services = services
        self._port = port
        self._password = password
        self._options = ["--no-defaults", "--user=root", f"--datadir={directory}", *_IN_A_HURRY]
        # Another server that starts would remove temporary tables from a directory that it shares.
        self._options.append(f"--tmpdir={directory}")

    def install(self) -> None:
        """Make its data directory, empty.

        :raises ServiceError: that failed.
        """
        self._services.run(
            NAME,
            ["mariadb-install-db", *self._options, "--skip-test-db"]
            + ["--auth-root-authentication-method=normal"],
        )

    def start(self, databases: Sequence[str]) -> None:
        """Start it with its data, and make what is not there of databases and their user.

        :raises ServiceError: it does not start.
        """
        self._services.start(
            NAME,
            ["/usr/sbin/mariadbd", *self._options, f"--pid-file={self.directory}/pid"]
            + ["--bind-address=127.0.0.1", f"--port={self._port}", f"--socket={self._socket}"]
            + ["--skip-name-resolve", "--max-connections=500", "--character-set-server=utf8mb3"],
        )
        self._services.wait_for_port(NAME, self._port)
        root = pymysql.connect(unix_socket=str(self._socket), user="root")
        with root, root.cursor() as cursor:
            user = f"'{USER}'@'%'"
            cursor.execute(f"CREATE USER IF NOT EXISTS {user}")
            cursor.execute(f"SET PASSWORD FOR {user} = PASSWORD('{self._password}')")
            for each in databases:
                cursor.execute(f"CREATE DATABASE IF NOT EXISTS {each}")
                cursor.execute(f"GRANT ALL ON {each}.* TO {user}")

    def stop(self) -> None:
        """End it if it runs; its data are whole."""
        self._services.close()

    def url(self, database: str) -> str:
        """As SQLAlchemy takes it."""
        where = f"{USER}:{self._password}@127.0.0.1:{self._port}"
        return f"mysql+pymysql://{where}/{database}?charset=utf8mb3"

    @property
    def _socket(self) -> Path:
        return self.directory / "socket"

# SPDX-License-Identifier: Apache-2.0
"""Database servers of other releases of Debian, in a chroot on this machine.

What a server needs is mounted into its tree in the namespace of its volume, where no one else sees
it.
"""

import json
import subprocess
from pathlib import Path

from tests.lab import databases, loop
from tests.lab.trees import MOUNT_POINT, Release

# Where the directory of a server is seen in its tree
_INSIDE = MOUNT_POINT
_PLUGINS = "usr/lib/mysql/plugin"


# Which keyring there is says each data directory for itself.
_KEYRING = (
    ("usr/sbin/mysqld.my", json.dumps({"read_local_manifest": True})),
    (f"{_PLUGINS}/component_keyring_file.cnf", json.dumps({"read_local_config": True})),
)
MARIADB_10_5 = Release("bullseye", "base-files,mariadb-server", "/usr/sbin/mariadbd")
MARIADB_11 = Release("trixie", "base-files,mariadb-server", "/usr/sbin/mariadbd")
MYSQL_9 = Release("sid", "base-files,mysql-server-core", "/usr/sbin/mysqld", _KEYRING)


class _InChroot(databases.Server):
    """What a server in a tree does otherwise. Its clients are this machine's."""

    RELEASE: Release

    @property
    def seen_datadir(self) -> Path:
        return _INSIDE / self.datadir.relative_to(self._directory)

    @property
    def seen_socket(self) -> Path:
        return _INSIDE / self.socket.relative_to(self._directory)

    def _enter(self, program: str) -> list[str]:
        """The start of a command in the tree, as the server's user."""
        user = f"--userspec={self._user.pw_uid}:{self._user.pw_gid}"
        return ["chroot", user, str(self.RELEASE.tree()), program, "--no-defaults"]

    def _mount(self) -> None:
        inside = self.RELEASE.tree() / _INSIDE.relative_to("/")
        loop.run([*self._volume.enter, "mount", "--rbind", str(self._directory), str(inside)])

    def _run(self, options: list[str], statements: str = "") -> None:
        argv = [*self._volume.enter, *self._enter(self.RELEASE.program), *options]
        done = subprocess.run(
            argv, input=statements, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise loop.DatabaseError(f"{' '.join(argv)} failed: {done.stdout}{done.stderr}")


class MariaDB11(_InChroot, databases.MariaDB):
    """Debian 13's MariaDB."""

    RELEASE = MARIADB_11
    # Where its statements are, and what the names of their files begin with
    SCRIPTS = "usr/share/mariadb/mariadb"

    def install(self) -> None:
        self._mount()
        self._make_datadir()
        parts = ("system_tables", "performance_tables", "system_tables_data")
        statements = "".join(
            (self.RELEASE.tree() / f"{self.SCRIPTS}_{part}.sql").read_text() for part in parts
        )
        loop.run([*self._volume.enter, "mkdir", str(self.datadir / "mysql")])
        loop.run([*self._volume.enter, "chown", "mysql:mysql", str(self.datadir / "mysql")])
        preamble = "SET @auth_root_socket=NULL, @skip_auth_anonymous=1;\nUSE mysql;\n"
        self._run([*self._options(), "--bootstrap"], preamble + statements)

    def _command(self) -> list[str]:
        return [*self._enter(self.RELEASE.program), *self._options()]


class MariaDB105(MariaDB11):
    """Debian 11's MariaDB, with the flush method that is the default of later ones."""

    RELEASE = MARIADB_10_5
    SCRIPTS = "usr/share/mysql/mysql"

    def _options(self) -> list[str]:
        return [*super()._options(), "--innodb-flush-method=O_DIRECT"]


class MySQL9(_InChroot):
    """Debian sid's MySQL, with a keyring."""

    RELEASE = MYSQL_9
    TABLESPACES = "innodb_tablespaces"
    SPECIAL = {
        "page-compressed": "COMPRESSION='zlib'",
        "encrypted": "ENCRYPTION='Y'",
        "compressed": "ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=8",
    }
    # It tells how to read the others.
    PLAIN_FIRST_PAGE = ("page-compressed",)

    def install(self) -> None:
        self._mount()
        self._make_datadir()
        self._run([f"--datadir={self.seen_datadir}", "--initialize-insecure"])
        keyring = {"path": str(self.seen_datadir / "keyring"), "read_only": False}
        for name, content in (
            ("mysqld.my", {"components": "file://component_keyring_file"}),
            ("component_keyring_file.cnf", keyring),
        ):
            (Path(f"/proc/{self._volume.holder_pid}/root{self.datadir}") / name).write_text(
                json.dumps(content)
            )

    def _command(self) -> list[str]:
        return [
            *self._enter(self.RELEASE.program),
            f"--datadir={self.seen_datadir}",
            f"--socket={self.seen_socket}",
            f"--mysqlx-socket={_INSIDE / 'mysqlx.sock'}",
            f"--pid-file={_INSIDE / 'server.pid'}",
            f"--tmpdir={_INSIDE}",
            "--skip-networking",
            "--skip-log-bin",
            "--secure-file-priv=NULL",
            "--innodb-flush-method=O_DIRECT",
            "--innodb-buffer-pool-size=128M",
        ]

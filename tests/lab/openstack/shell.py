# SPDX-License-Identifier: Apache-2.0
"""Scripts in a server, from among its clients: the other end of ``guest_scripts/shell.py``."""

import subprocess
from pathlib import Path

from tests.lab.hosts import Host

PORT = 2222
SERVER = Path(__file__).with_name("guest_scripts") / "shell.py"
#: Seconds for a script in an emulated guest, and for a connection.
_PATIENCE, _REACH = 300, 30


class ShellError(Exception):
    """A script has failed, or the server was not reached; the message has what was said."""


def run(clients: Host, address: str, script: str) -> str:
    """Run a script of bash in a server; what it says.

    :raises ShellError: it failed.
    """
    where = f"TCP:{address}:{PORT},connect-timeout={_REACH}"
    # After the end of the script it waits so long for the answer
    argv = ["socat", "-t", str(_PATIENCE), "-", where]
    done = subprocess.run(
        clients.argv(argv), input=script, capture_output=True, text=True, check=False,
        timeout=2 * _PATIENCE,
    )  # fmt: skip
    said, _, status = done.stdout.rpartition("\n")
    if done.returncode or status != "0":
        raise ShellError(f"{script[:200]!r} at {address}: {done.stdout}{done.stderr}")
    return said

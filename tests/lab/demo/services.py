# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate as it is installed on the lab's hosts: their services, and the command line."""

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.migration.history import History
from nova_dmigrate.migration.summary import MigrationSummary
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST
from tests.lab.broker import Broker
from tests.lab.database_guest import INSTANCE
from tests.lab.demo.clients import ROOT
from tests.lab.libvirt_host import GUESTS, LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import spawn, terminate
from tests.lab.relays import wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc.broker import BrokerTransport

_SOCKETS = "/run/nova-dmigrate"
_STATE = "/run/nova-dmigrate-state"


class MigrationServices:
    """A broker, and the service of each host. A context manager."""

    def __init__(self, hosts: LibvirtHosts, directory: Path) -> None:
        """:param directory: for configuration, logs and the history of migrations."""
        self._hosts = (hosts.a, hosts.b)
        self._directory = directory
        self._ends = contextlib.ExitStack()
        try:
            self._broker = self._ends.enter_context(Broker([]))
            for host in self._hosts:
                self._configuration(host).write_text(self._options(host))
                host.forward(self._broker.port)
                self._start(host)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "MigrationServices":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the services, and the broker. Relays end with the hosts."""
        self._ends.close()

    def begin(
        self, domain: str, source: LibvirtHost, destination: LibvirtHost, options: Sequence[str]
    ) -> "Order":
        """Have an operator at the source order a migration.

        :param options: of `nova-dmigrate migrate`.
        """
        return Order(
            source.argv(
                [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.cli.app"]
                + ["--config-file", str(self._configuration(source))]
                + ["migrate", domain, destination.peer_uri, "--instance", INSTANCE]
                + ["--source-host", source.name, "--destination-host", destination.name]
                + list(options)
            ),
            self._directory / "order.log",
            self._directory / "history",
        )

    def last_words(self) -> str:
        """What the services have said last, for error messages."""
        return "\n".join(
            self._log(host).read_bytes()[-3000:].decode(errors="replace") for host in self._hosts
        )

    def _start(self, host: LibvirtHost) -> None:
        argv = [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.host"]
        argv += ["--config-file", str(self._configuration(host))]
        with open(self._log(host), "ab") as log:
            process = spawn(
                host.argv(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
            )
        self._ends.callback(terminate, process)
        transport = BrokerTransport(host.name, self._broker.services_url(), HOST)
        with HostClient(host.name, transport, timeout=5) as client:

            def answers() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"a host's service has ended: {self.last_words()}")
                with contextlib.suppress(exception.HostUnreachable):
                    return client.hello().host == host.name
                return False

            wait_until(answers, f"the service of {host.name} answers")

    def _configuration(self, host: LibvirtHost) -> Path:
        return self._directory / f"{host.name}.conf"

    def _log(self, host: LibvirtHost) -> Path:
        return self._directory / f"{host.name}.log"

    def _options(self, host: LibvirtHost) -> str:
        # An emulated guest, and hosts that share two processors with it, take their time
        return f"""
[DEFAULT]
transport_url = {self._broker.services_url()}
[wire]
tls = false
listen_address = {host.address}
[host]
name = {host.name}
socket_directory = {_SOCKETS}
state_directory = {_STATE}
channel_directories = {GUESTS}
drain_timeout = 1
[migration]
history_directory = {self._directory}/history
agent_timeout = 30
host_timeout = 10
"""


class Order:
    """A migration that the command line carries out."""

    def __init__(self, argv: Sequence[str], log: Path, history: Path) -> None:
        self._log, self._history = log, history
        self._known = {each.id for each in History(history).list()}
        with open(log, "wb") as said:
            self._process: subprocess.Popen[Any] = spawn(
                argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=_environment()
            )

    def wait(self, timeout: float) -> MigrationSummary | None:
        """Wait for its end; None if nothing was migrated (`last_words` tells why).

        It is cancelled if it is not over in time.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        terminate(self._process, patience=60)
        new = [each for each in History(self._history).list() if each.id not in self._known]
        return new[0] if new else None

    def last_words(self) -> str:
        return self._log.read_bytes()[-3000:].decode(errors="replace")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}

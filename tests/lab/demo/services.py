# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate as it is installed on the lab's hosts: their services, and an operator's order."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from oslo_config import cfg

from nova_dmigrate import conf, exception
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import MigrationRequest
from nova_dmigrate.migration.summary import MigrationSummary
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST
from tests.lab.broker import Broker
from tests.lab.database_guest import INSTANCE
from tests.lab.demo.clients import ROOT
from tests.lab.libvirt_host import GUESTS, LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import end, spawn, terminate
from tests.lab.relays import wait_until
from tests.unit.relay.wire.certificates import Authority

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.migration import service
    from nova_dmigrate.rpc import broker

#: Arguments of Python that make it a host's service.
PROGRAM = ("-m", "nova_dmigrate.cmd.host")
_SOCKETS = "/run/nova-dmigrate"
_STATE = "/run/nova-dmigrate-state"


class MigrationServices:
    """A broker, and the service of each host. A context manager."""

    def __init__(
        self,
        hosts: LibvirtHosts,
        directory: Path,
        compression: bool = True,
        tls: bool = False,
        **options: object,
    ) -> None:
        """:param directory: for configuration, logs, certificates and the history of migrations.
        :param compression: whether the hosts' relays compress.
        :param tls: whether relays speak TLS.
        :param options: of the operator's group ``[migration]``.
        """
        self._compression = compression
        self._authority: Authority | None = None
        if tls:
            certificates = directory / "certificates"
            certificates.mkdir()
            self._authority = Authority(certificates)
        # An emulated guest, and hosts that share two processors with it, take their time
        self._more = {"agent_timeout": 30, "host_timeout": 10, **options}
        self._hosts = (hosts.a, hosts.b)
        self._directory = directory
        self._ends = contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._broker = self._ends.enter_context(Broker([]))
            self._operator = self._operator_configuration()
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

    def migrate(
        self,
        domain: str,
        source: LibvirtHost,
        destination: LibvirtHost,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> MigrationSummary:
        """Have a domain migrated, as the command line does; how it went.

        :param options: of the request, as `MigrationRequest` has them.
        :raises MigrationError: there is no such domain; or relays were required and cannot be had.
        """
        usual = {
            "destination_uri": destination.peer_uri,
            "connect_uri": source.uri,
            "instance": INSTANCE,
            "source_host": source.name,
            "destination_host": destination.name,
        }
        request = MigrationRequest(domain, **{**usual, **options})
        return service.migrate(request, self._operator, on_progress, cancelled)

    @contextlib.contextmanager
    def operating(self, **options: object) -> Iterator[None]:
        """Meanwhile the operator has other options, named ``group__option``."""
        parts = [(name.partition("__"), value) for name, value in options.items()]
        for (group, _, option), value in parts:
            self._operator.set_override(option, value, group)
        try:
            yield
        finally:
            for (group, _, option), _ in parts:
                self._operator.clear_override(option, group)

    def kill(self, host: LibvirtHost) -> None:
        """End a host's service as a crash does; its relays go on."""
        end(self._processes.pop(host.name))

    def stop(self, host: LibvirtHost) -> None:
        """Tell a host's service to end; it may wait for its relays."""
        os.kill(self.pid(host), signal.SIGTERM)

    def start(self, host: LibvirtHost) -> None:
        """Start a host's service, and wait until it answers."""
        self._start(host)

    @contextlib.contextmanager
    def changed(
        self, host: LibvirtHost, program: Sequence[str] = PROGRAM, **options: object
    ) -> Iterator[None]:
        """Meanwhile a host's service is another one, or has other options, named
        ``group__option``.
        """
        more = self._directory / f"{host.name}-more.conf"
        parts = [(name.partition("__"), value) for name, value in options.items()]
        more.write_text(
            "".join(f"[{group}]\n{name} = {value}\n" for (group, _, name), value in parts)
        )
        self.kill(host)
        try:
            self._start(host, program, more)
            yield
        finally:
            if host.name in self._processes:
                self.kill(host)
            self._start(host)

    def client(self, host: LibvirtHost) -> HostClient:
        """Asks the service of a host."""
        transport = broker.BrokerTransport(host.name, self._broker.services_url(), HOST)
        return HostClient(host.name, transport, timeout=5)

    @property
    def broker(self) -> Broker:
        """What services and operator speak over."""
        return self._broker

    def pid(self, host: LibvirtHost) -> int:
        """The process of a host's service."""
        return self._processes[host.name].pid

    def left_behind(self) -> list[Path]:
        """Files of migrations that should be over: sockets, sessions, maps; not what is kept of
        them, their summaries."""
        places = [host.outside(Path(_SOCKETS)) for host in self._hosts]
        places += [host.outside(Path(_STATE)) / "sessions" for host in self._hosts]
        places.append(self._directory / "maps")
        return [path for place in places if place.is_dir() for path in place.iterdir()]

    def last_words(self) -> str:
        """What the services have said last, for error messages."""
        return "\n".join(
            self._log(host).read_bytes()[-3000:].decode(errors="replace") for host in self._hosts
        )

    def _start(self, host: LibvirtHost, program: Sequence[str] = PROGRAM, *more: Path) -> None:
        """:param more: configuration that counts more than the usual."""
        argv = [sys.executable, "-W", "ignore", *program]
        for path in (self._configuration(host), *more):
            argv += ["--config-file", str(path)]
        with open(self._log(host), "ab") as log:
            process = spawn(
                host.argv(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
            )
        self._processes[host.name] = process
        self._ends.callback(terminate, process)
        with self.client(host) as client:

            def answers() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"a host's service has ended: {self.last_words()}")
                with contextlib.suppress(exception.HostUnreachable):
                    return client.hello().host == host.name
                return False

            wait_until(answers, f"the service of {host.name} answers")

    def _operator_configuration(self) -> cfg.ConfigOpts:
        path = self._directory / "operator.conf"
        options = "".join(f"{name} = {value}\n" for name, value in self._more.items())
        path.write_text(
            f"[DEFAULT]\ntransport_url = {self._broker.services_url()}\n"
            f"[host]\nstate_directory = {self._directory}\n"
            f"[migration]\nhistory_directory = {self._directory}/history\n{options}"
        )
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config([], project="nova-dmigrate", default_config_files=[str(path)])
        broker.set_defaults(config)
        return config

    def _configuration(self, host: LibvirtHost) -> Path:
        return self._directory / f"{host.name}.conf"

    def _log(self, host: LibvirtHost) -> Path:
        return self._directory / f"{host.name}.log"

    def _options(self, host: LibvirtHost) -> str:
        return f"""
[DEFAULT]
transport_url = {self._broker.services_url()}
[wire]
{self._tls_options(host)}
listen_address = {host.address}
[host]
name = {host.name}
socket_directory = {_SOCKETS}
state_directory = {_STATE}
channel_directories = {GUESTS}
volume_directories = /
map_directories = {self._directory}/maps
drain_timeout = 1
[relay]
compression = {self._compression}
"""

    def _tls_options(self, host: LibvirtHost) -> str:
        if self._authority is None:
            return "tls = false"
        certificate, key = self._authority.issue(host.name)
        return (
            f"ca_file = {self._authority.certificate}\n"
            f"certificate_file = {certificate}\nkey_file = {key}"
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}

# SPDX-License-Identifier: Apache-2.0
"""Services of two hosts as real processes on this machine, and a pair of relays run by them.

Each has directories of its own, as if it were on a host of its own.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import FINAL, HOST, SessionState
from tests.lab import processes
from tests.lab.relays import PATIENCE, Report, SavedMap, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc.broker import BrokerTransport


class HostService:
    """nova-dmigrate-host, as a process."""

    def __init__(
        self,
        name: str,
        directory: Path,
        url: str,
        prefix: Sequence[str] = (),
        **options: object,
    ) -> None:
        """:param prefix: command that runs it, as setpriv does.
        :param options: of the configuration file, "group__name".
        """
        self.name = name
        self.url = url
        self.prefix = prefix
        directory.mkdir()
        self.sockets = directory / "run"
        self.state = directory / "state"
        self.log_file = directory / "log"
        self.configuration = directory / "host.conf"
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(**options)

    def configure(self, **options: object) -> None:
        """Write the configuration; a service that runs keeps its own."""
        values = {
            "DEFAULT__transport_url": self.url,
            "wire__tls": "false",
            "wire__listen_address": "127.0.0.1",
            "host__name": self.name,
            "host__state_directory": self.state,
            "host__socket_directory": self.sockets,
            # Each test has its files elsewhere
            "host__volume_directories": "/",
            "host__map_directories": f"/,{self.state}/maps",
            # Guests have none
            "host__libvirt_uri": "",
            **options,
        }
        groups: dict[str, list[str]] = {}
        for key, value in values.items():
            group, _, option = key.partition("__")
            groups.setdefault(group, []).append(f"{option} = {value}\n")
        self.configuration.write_text(
            "".join(f"[{group}]\n" + "".join(lines) for group, lines in groups.items())
        )

    def start(self) -> None:
        """Start it, and wait until it can be asked."""
        self.process = self.spawn()
        with self.client() as client:
            wait_until(lambda: self._answers(client), f"the service of host {self.name} answers")

    def spawn(self) -> "subprocess.Popen[bytes]":
        """A process of the service, whatever becomes of it."""
        program = [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.host"]
        with self.log_file.open("ab") as log:
            return processes.spawn(
                [*self.prefix, *program, "--config-file", str(self.configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def client(self, timeout: float = 10.0) -> HostClient:
        """A new client of it; close it."""
        return HostClient(self.name, BrokerTransport(self.name, self.url, HOST), timeout)

    def kill(self) -> None:
        """End it as a crash does. Its relays go on."""
        assert self.process is not None
        processes.end(self.process)

    def terminate(self) -> None:
        """Ask it to stop."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end after `terminate`; its exit status."""
        assert self.process is not None
        self.process.wait(patience)
        return processes.end(self.process)

    def records(self) -> list[Report]:
        """What it has on disk of its sessions."""
        records = []
        for path in (self.state / "sessions").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                records.append(json.loads(path.read_text()))
        return records

    def relays(self) -> list[int]:
        """Numbers of the processes of its relays that exist; the reaper knows them from now on."""
        pids = []
        for record in self.records():
            pid = record["pid"]
            started = processes.start_time(pid) if pid else None
            if started is not None and record["started"].endswith(f"/{started}"):
                processes.register.add("pid", f"{pid}:{started}")
                pids.append(pid)
        return pids

    def left_behind(self) -> list[Path]:
        """Files of sessions, but summaries."""
        return [*self.sockets.iterdir(), *(self.state / "sessions").iterdir()]

    def close(self) -> None:
        """End it and its relays, whatever they do."""
        if self.process is not None:
            processes.end(self.process)
        for pid in self.relays():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of its log and of its relays', for error messages."""
        with contextlib.suppress(OSError):
            return self.log_file.read_bytes()[-6000:].decode(errors="replace")
        return ""

    def _answers(self, client: HostClient) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the service has ended:\n{self.last_words()}")
        try:
            # A killed predecessor's queue may still be there
            return client.hello().host == self.name
        except exception.HostUnreachable:
            return False


class ServedRelay:
    """One relay of a pair, as its host's service tells of it."""

    def __init__(
        self, service: HostService, client: HostClient, session_id: str, lease_seconds: float
    ) -> None:
        self.service = service
        self.client = client
        self.session_id = session_id
        self.lease_seconds = lease_seconds

    def renew(self) -> SessionState:
        return self.client.renew(self.session_id, self.lease_seconds)

    def wait(self, *states: str) -> SessionState:
        """Wait until it is in one of these states.

        :raises AssertionError: it has ended otherwise.
        """

        def reached() -> SessionState | None:
            state = self.renew()
            if state.state in states:
                return state
            if state.state in FINAL:
                raise AssertionError(f"{state}\n{self.service.last_words()}")
            return None

        result: SessionState = wait_until(reached, f"{self.session_id} is {states}")
        self.service.relays()
        return result

    def progress(self) -> Report | None:
        """What the relay tells of itself now, None if it does not."""
        try:
            text = self.renew().progress
        except exception.HostUnreachable:
            return None
        return json.loads(text) if text else None

    def told(self) -> Report:
        """The same, once it does: a relay or service that is busy is asked again."""
        result: Report = wait_until(self.progress, f"{self.session_id} tells of itself")
        return result


class ServedPair:
    """Source and destination relay of one migration, by the services of two hosts.

    ``outgoing`` and ``incoming`` are the sockets for the QEMUs of source and destination.
    """

    def __init__(
        self,
        hosts: tuple[HostService, HostService],
        *,
        volumes: dict[str, Path] | None = None,
        saved: SavedMap | None = None,
        tls_names: tuple[str, str] | None = None,
        lease_seconds: float = 30.0,
        **caps: float,
    ) -> None:
        """:param tls_names: what source and destination have to show; None for no TLS.
        :param caps: ``network_bandwidth``, ``volume_bandwidth`` (bytes a second),
        ``wait_seconds``.
        """
        source, destination = hosts
        self.migration_id = str(uuid.uuid4())
        session_id = str(uuid.uuid4())
        self._stack = contextlib.ExitStack()
        self.source = self._relay(source, session_id, lease_seconds)
        self.destination = self._relay(destination, session_id, lease_seconds)
        self.outgoing = source.sockets / self.migration_id / "qemu"
        self.incoming = destination.sockets / self.migration_id / "qemu"
        self.saved = saved
        self.tls_names = tls_names
        self.order = host_messages.OpenDestination(
            migration_id=self.migration_id,
            instance=str(uuid.uuid4()),
            session_id=session_id,
            token=secrets.token_hex(32),
            qemu_socket=str(self.incoming),
            volumes=tuple(
                host_messages.Volume(name, "block", str(path))
                for name, path in (volumes or {}).items()
            ),
            tls_peer_name=tls_names[0] if tls_names else None,
            lease_seconds=lease_seconds,
            **caps,
        )

    def open(self) -> "ServedPair":
        """Start both, and wait until they run."""
        self.open_destination()
        self.destination.wait("running")
        self.open_source()
        self.source.wait("running")
        return self

    def open_destination(self) -> SessionState:
        return self.destination.client.open_session(self.order)

    def open_source(self, **changes: Any) -> SessionState:
        """Start the source relay, for a destination relay that runs.

        :param changes: of the order.
        """
        where = self.destination.renew()
        assert where.host is not None and where.port is not None, where
        values = {
            field.name: getattr(self.order, field.name) for field in dataclasses.fields(self.order)
        }
        return self.source.client.open_session(
            host_messages.OpenSource(
                **{
                    **values,
                    "qemu_socket": str(self.outgoing),
                    "tls_peer_name": self.tls_names[1] if self.tls_names else None,
                    **changes,
                },
                host=where.host,
                port=where.port,
                buffer_map=str(self.saved.buffer_map) if self.saved else None,
                memory_layout=str(self.saved.memory_layout) if self.saved else None,
            )
        )

    def renew(self, lease_seconds: float) -> None:
        """Keep both for so long."""
        for relay in (self.source, self.destination):
            relay.client.renew(relay.session_id, lease_seconds)

    def close_sessions(self) -> tuple[SessionState, SessionState]:
        """Close both at their services; their last states, the source's first."""
        return tuple(
            relay.client.close_session(relay.session_id)
            for relay in (self.source, self.destination)
        )  # type: ignore[return-value]

    def close(self) -> None:
        """End whatever is left of it."""
        for relay in (self.source, self.destination):
            with contextlib.suppress(exception.HostError):
                relay.client.close_session(relay.session_id)
        self._stack.close()

    def last_words(self) -> str:
        return "\n".join(
            f"{relay.service.name}:\n{relay.service.last_words()}"
            for relay in (self.source, self.destination)
        )

    def __enter__(self) -> "ServedPair":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def _relay(self, service: HostService, session_id: str, lease_seconds: float) -> ServedRelay:
        client = self._stack.enter_context(service.client())
        return ServedRelay(service, client, session_id, lease_seconds)

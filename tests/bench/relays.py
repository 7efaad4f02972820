# SPDX-License-Identifier: Apache-2.0
"""The two relays of one migration as processes of their own, on one host or on two."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_dmigrate.relay.monitor import ask
from nova_dmigrate.relay.wire.tls import TlsSettings
from tests.integration.lab.hosts import Host
from tests.integration.lab.processes import end, spawn

_TICKS = os.sysconf("SC_CLK_TCK")

Options = Mapping[str, Mapping[str, object]]


class BenchError(Exception):
    """A measurement could not be made; the message holds what the process said."""


def cpu_seconds(pid: int) -> float:
    """User and system time that a running process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Measured:
    """A process whose CPU time counts from :meth:`begin` on, not its start-up."""

    def __init__(self, process: "subprocess.Popen[Any]") -> None:
        self.process = process
        self._before = 0.0

    def begin(self) -> None:
        self._before = cpu_seconds(self.process.pid)

    def finish(self, timeout: float = 30) -> float:
        """Wait for the process's own end; returns the CPU seconds since :meth:`begin`."""
        deadline = time.monotonic() + timeout
        while True:
            # Not Popen.wait, which throws the resource usage away.
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                end(self.process)
                raise BenchError(f"{self.process.args} did not end")
            time.sleep(0.005)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        end(self.process)
        return usage.ru_utime + usage.ru_stime - self._before


@dataclass
class RelayRun:
    """What a migration through two relays needs and, after :meth:`RelayPair.finish`, what came."""

    directory: Path
    source_host: Host | None = None
    destination_host: Host | None = None
    buffer_map: Path | None = None
    memory_layout: Path | None = None
    volume: Path | None = None
    source_tls: TlsSettings | None = None
    destination_tls: TlsSettings | None = None
    options: Options = field(default_factory=dict)


class RelayPair:
    """Two relays, ready when made. A context manager that ends what still runs."""

    def __init__(self, run: RelayRun) -> None:
        self._run = run
        self._token = secrets.token_hex(32)
        self.source_socket = run.directory / "relay-source.sock"
        self.destination_socket = run.directory / "relay-destination.sock"
        self._control = run.directory / "relay-source.control"
        self._processes: list[Measured] = []
        self.source_summary: dict[str, Any] = {}
        self.destination_summary: dict[str, Any] = {}
        self._config = run.directory / "relay.conf"
        wire = {"tls": run.source_tls is not None}
        self._config.write_text(_config_text({"wire": wire, **run.options}))
        try:
            ready = self._start("destination", run.destination_host, self._destination())
            self._start("source", run.source_host, self._source(ready["host"], ready["port"]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RelayPair":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def source(self) -> Measured:
        return self._processes[1]

    @property
    def destination(self) -> Measured:
        return self._processes[0]

    def begin(self) -> None:
        """CPU time counts from now on."""
        for measured in self._processes:
            measured.begin()

    def progress(self) -> dict[str, Any]:
        """The source relay's progress; empty once it has ended."""
        try:
            return ask(self._control, "progress")
        except (OSError, ValueError):
            return {}

    def finish(self) -> tuple[float, float]:
        """Wait for both relays' end; CPU seconds of source and destination.

        :raises BenchError: the migration was not delivered.
        """
        seconds = self.source.finish(), self.destination.finish()
        for role in ("source", "destination"):
            summary = json.loads((self._run.directory / f"{role}.json").read_text())
            setattr(self, f"{role}_summary", summary)
            if summary["state"] != "delivered":
                raise BenchError(f"{role} relay: {summary['reason']}\n{self._log(role)}")
        return seconds

    def close(self) -> None:
        for measured in self._processes:
            end(measured.process)

    def _session(self, role: str) -> dict[str, object]:
        return {
            "role": role,
            "instance": "bench",
            "session_id": "bench",
            "token": self._token,
            "summary": str(self._run.directory / f"{role}.json"),
            "control_socket": str(self._run.directory / f"relay-{role}.control"),
        }

    def _destination(self) -> dict[str, object]:
        run = self._run
        session = self._session("destination")
        session |= {"qemu_socket": str(self.destination_socket), "port": 0}
        session["host"] = run.destination_host.address if run.destination_host else "127.0.0.1"
        if run.destination_tls is not None:
            session["tls"] = _tls(run.destination_tls)
        if run.volume is not None:
            location = str(run.volume)
            session["volumes"] = [{"volume_id": "volume", "driver": "block", "location": location}]
        return session

    def _source(self, host: str, port: int) -> dict[str, object]:
        run = self._run
        session = self._session("source")
        session |= {"qemu_socket": str(self.source_socket), "host": host, "port": port}
        if run.source_tls is not None:
            session["tls"] = _tls(run.source_tls)
        if run.buffer_map is not None:
            session["buffer_map"] = str(run.buffer_map)
            session["memory_layout"] = str(run.memory_layout)
        return session

    def _start(self, role: str, host: Host | None, session: dict[str, object]) -> dict[str, Any]:
        argv = [sys.executable, "-m", "nova_dmigrate.cmd.relay", "--config-file", self._config]
        log = (self._run.directory / f"{role}.log").open("wb")
        process = spawn(
            host.argv(argv) if host else argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        log.close()
        self._processes.append(Measured(process))
        process.stdin.write(json.dumps(session).encode())
        process.stdin.close()
        line = process.stdout.readline()
        event: dict[str, Any] = json.loads(line) if line else {}
        if event.get("event") != "ready":
            raise BenchError(f"the {role} relay did not start: {event}\n{self._log(role)}")
        return event

    def _log(self, role: str) -> str:
        return (self._run.directory / f"{role}.log").read_text(errors="replace")[-2000:]


def _tls(settings: TlsSettings) -> dict[str, str]:
    return {
        "ca": str(settings.ca),
        "certificate": str(settings.certificate),
        "key": str(settings.key),
        "peer_name": settings.peer_name,
    }


def _config_text(options: Options) -> str:
    lines = []
    for group, values in options.items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {value}" for name, value in values.items()]
    return "\n".join(lines) + "\n"

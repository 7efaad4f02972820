# SPDX-License-Identifier: Apache-2.0
"""A pair of relays as real processes, and the orchestration of a migration through them.

migration_map = save_map(source, directory)
with RelayPair(directory, destination_qemu, volumes={"volume": disk}, saved=migration_map) as pair:
    state = migrate_through_relays(source, pair)
pair.check_clean()
"""

import contextlib
import json
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap, VolumeExtents
from nova_dmigrate.relay.monitor import ask
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeSpec
from tests.lab.guest import Guest
from tests.lab.hosts import Host
from tests.lab.processes import end, spawn, start_time

#: Seconds that anything may take before a test says that it hangs.
PATIENCE = 90.0
#: The volume's name in maps and sessions.
VOLUME = "volume"

Report = dict[str, Any]


class RelayFailed(Exception):
    """A relay did not do what it was asked; the message holds what it last said."""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Poll until ``condition`` returns something true, and return that.

    :raises TimeoutError: it did not in ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.01)


class RelayProcess:
    """One relay: ``nova-dmigrate-relay`` with its session on standard input."""

    def __init__(
        self,
        role: str,
        session: Report,
        directory: Path,
        options: Mapping[str, object],
        host: Host | None = None,
    ) -> None:
        """:param options: values of the configuration file by "group.name"."""
        self.role = role
        self.control_socket = directory / f"{role}.control"
        self.summary_file = directory / f"{role}.json"
        self.log_file = directory / f"{role}.log"
        self.killed = False
        self.end_event: Report | None = None
        self._events: queue.Queue[Report | None] = queue.Queue()
        self.summary_file.unlink(missing_ok=True)
        config = directory / f"{role}.conf"
        config.write_text(_config({"wire.tls": "false", **options}))
        session = {
            **session,
            "role": role,
            "control_socket": str(self.control_socket),
            "summary": str(self.summary_file),
        }
        argv = [sys.executable, "-m", "nova_dmigrate.cmd.relay", "--config-file", str(config)]
        if host is not None:
            argv = host.argv(argv)
        with open(self.log_file, "wb") as log:
            self._process = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.pid = self._process.pid
        self._started = start_time(self.pid)
        assert self._process.stdin is not None
        # A relay that ends at once (a wrong configuration) may not read it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(session).encode())
            self._process.stdin.close()
        self._reader = threading.Thread(target=self._read_events, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, timeout: float = PATIENCE) -> Report:
        """Wait for the event "ready" and return it.

        :raises RelayFailed: the relay has ended instead.
        """
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise RelayFailed(f"the {self.role} relay is not ready\n{self.last_words()}") from None
        if event is None or event["event"] != "ready":
            raise RelayFailed(f"the {self.role} relay did not start: {event}\n{self.last_words()}")
        return event

    def progress(self) -> Report | None:
        """What the relay tells of itself now; None once it has ended."""
        try:
            return ask(self.control_socket, "progress", timeout=PATIENCE)
        except (OSError, ValueError):
            # It may be on its way out; `wait` tells how.
            return None

    def use_map(self, saved: "SavedMap") -> None:
        """Have it load a map now."""
        files = {name: str(getattr(saved, name)) for name in ("buffer_map", "memory_layout")}
        answer = ask(self.control_socket, "map", timeout=PATIENCE, **files)
        if answer != {"loading": True}:
            raise RelayFailed(f"the {self.role} relay takes no map: {answer}")

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the relay's end; returns its exit status.

        :raises RelayFailed: it does not end.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RelayFailed(f"the {self.role} relay hangs\n{self.last_words()}") from None
        self._reader.join(timeout)
        return status

    def summary(self) -> Report:
        """The summary that the relay has written at its end."""
        summary: Report = json.loads(self.summary_file.read_text())
        return summary

    def freeze(self) -> None:
        """Stop it where it is (SIGSTOP), so that the moment lasts: until ``kill`` or ``thaw``."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after ``freeze``."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does (SIGKILL)."""
        self.killed = True
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Ask it to give up (SIGTERM)."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it, whatever it does."""
        end(self._process)

    def last_words(self) -> str:
        """The end of its log, for error messages."""
        with contextlib.suppress(OSError):
            return self.log_file.read_bytes()[-3000:].decode(errors="replace")
        return ""

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: Report = json.loads(line)
            if event["event"] == "end":
                self.end_event = event
            self._events.put(event)
        self._events.put(None)


@dataclass(frozen=True)
class SavedMap:
    """Files of a buffer map and of the memory layout that places it."""

    buffer_map: Path
    memory_layout: Path


class RelayPair:
    """Source and destination relay of one migration, both ready. A context manager."""

    def __init__(
        self,
        directory: Path,
        incoming: Path,
        *,
        volumes: Mapping[str, Path | VolumeSpec] | None = None,
        saved: SavedMap | None = None,
        hosts: tuple[Host, Host] | None = None,
        outgoing: Path | None = None,
        tls: tuple[TlsSettings, TlsSettings] | None = None,
        **options: object,
    ) -> None:
        """:param incoming: UNIX socket of the destination QEMU, which need not exist yet.
        :param volumes: of each of the instance's volumes, its path at the destination, or how else
            it is reached there.
        :param hosts: namespaces of source and destination; the test's own if None. `incoming` and
            `outgoing` are paths there.
        :param outgoing: UNIX socket for the source QEMU; one in ``directory`` if None.
        :param tls: settings of source and destination.
        :param options: of the configuration files, "group__name"; see nova_dmigrate.conf.
        """
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.outgoing = outgoing or directory / "outgoing"
        values = {name.replace("__", "."): value for name, value in options.items()}
        source_host, destination_host = hosts or (None, None)
        common = {
            "instance": str(uuid.uuid4()),
            "session_id": str(uuid.uuid4()),
            "token": secrets.token_hex(32),
        }
        self._started: list[RelayProcess] = []
        try:
            self.destination = RelayProcess(
                "destination",
                {
                    **common,
                    "qemu_socket": str(incoming),
                    "host": destination_host.address if destination_host else "127.0.0.1",
                    "port": 0,
                    "tls": _tls(tls[1]) if tls else None,
                    "volumes": [_volume(*each) for each in (volumes or {}).items()],
                },
                directory,
                values,
                destination_host,
            )
            self._started.append(self.destination)
            ready = self.destination.ready()
            session = {
                **common,
                "qemu_socket": str(self.outgoing),
                "host": ready["host"],
                "port": ready["port"],
                "tls": _tls(tls[0]) if tls else None,
            }
            if saved is not None:
                session["buffer_map"] = str(saved.buffer_map)
                session["memory_layout"] = str(saved.memory_layout)
            self.source = RelayProcess("source", session, directory, values, source_host)
            self._started.append(self.source)
            self.source.ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RelayPair":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if error is not None:
            # The test's failure tells more with what the relays said.
            print(self.last_words(), file=sys.stderr)
        self.close()

    def wait(self) -> tuple[int, int]:
        """Wait for both relays to end by themselves; returns their exit statuses."""
        return self.source.wait(), self.destination.wait()

    def close(self) -> None:
        """End what still runs."""
        for relay in self._started:
            relay.close()

    def last_words(self) -> str:
        return "\n".join(f"{relay.role} relay:\n{relay.last_words()}" for relay in self._started)

    def check_clean(self) -> None:
        """Both relays must have ended and their sockets be gone.

        Files of sockets are all that a relay killed by SIGKILL may leave behind; the next migration
        with the same paths shows that they do no harm.
        """
        allowed = set()
        for relay in self._started:
            if start_time(relay.pid) == relay._started and relay.alive:
                raise AssertionError(f"the {relay.role} relay still runs")
            if relay.killed:
                allowed.add(relay.control_socket)
                if relay.role == "source":
                    allowed.add(self.outgoing)
        left = [path for path in self.directory.iterdir() if path.is_socket()]
        unexpected = set(left) - allowed
        if unexpected:
            raise AssertionError(f"sockets are left: {sorted(map(str, unexpected))}")


def extents(guest: Guest, volume_id: str = VOLUME) -> VolumeExtents:
    """The running guest's own buffer map, a page an extent."""
    gpa, offset = guest.buffer_map_extents()
    size = guest.spec.disk.stat().st_size
    return VolumeExtents(volume_id, size, gpa, offset, np.full(len(gpa), PAGE_SIZE, np.uint64))


def save_layout(guest: Guest, path: Path) -> Path:
    """Write where the guest's RAMBlocks lie in its memory."""
    path.write_text(guest.hmp("info mtree -f"))
    return path


def save_map(
    guest: Guest, directory: Path, maps: Iterable[VolumeExtents] | None = None
) -> SavedMap:
    """Write a guest's map (its own, or another one) and its memory layout.

    :raises BufferMapError: the extents make no map.
    """
    directory.mkdir(exist_ok=True)
    path = directory / "buffer-map"
    BufferMap.build([extents(guest)] if maps is None else maps).save(path)
    return SavedMap(path, save_layout(guest, directory / "memory-layout"))


def prepare(source: Guest, downtime_ms: int = 1, capabilities: Iterable[str] = ()) -> None:
    """Set a source QEMU's migration up as the orchestration would."""
    known = ("return-path", "xbzrle", "postcopy-ram", "multifd", "pause-before-switchover")
    wanted = {"return-path", *capabilities}
    source.qmp(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": name in wanted} for name in known],
    )
    source.set_parameters(downtime_limit=downtime_ms, max_bandwidth=1 << 34)


def finish(
    source: Guest, pair: RelayPair, downtime_ms: int = 300, timeout: float = PATIENCE
) -> Report:
    """Play the orchestration until QEMU's migration has ended: the guest's downtime stays at 1 ms
    until every reference is resolved, then it is ``downtime_ms``.

    :returns: query-migrate of the end.
    """
    deadline = time.monotonic() + timeout
    allowed = False
    while True:
        state = source.migration()
        if state.get("status") in ("completed", "failed", "cancelled"):
            return state
        if not allowed:
            progress = pair.source.progress()
            if progress is not None and progress["bulk_resolved"]:
                source.set_parameters(downtime_limit=downtime_ms)
                allowed = True
        if time.monotonic() > deadline:
            raise TimeoutError(f"the migration hangs: {state}\n{pair.last_words()}")
        time.sleep(0.02)


def migrate_through_relays(
    source: Guest,
    pair: RelayPair,
    downtime_ms: int = 300,
    timeout: float = PATIENCE,
    capabilities: Iterable[str] = (),
) -> Report:
    """Migrate a running guest to the QEMU behind ``pair``; returns query-migrate of the end."""
    prepare(source, capabilities=capabilities)
    source.migrate(pair.outgoing)
    return finish(source, pair, downtime_ms, timeout)


def _config(options: Mapping[str, object]) -> str:
    groups: dict[str, list[str]] = {}
    for name, value in options.items():
        group, _, option = name.rpartition(".")
        groups.setdefault(group or "DEFAULT", []).append(f"{option} = {value}")
    return "\n".join(line for group in groups for line in (f"[{group}]", *groups[group])) + "\n"


def _volume(name: str, place: Path | VolumeSpec) -> Report:
    if isinstance(place, VolumeSpec):
        return {"volume_id": name, "driver": place.driver, "location": place.location}
    return {"volume_id": name, "driver": "block", "location": str(place)}


def _tls(settings: TlsSettings) -> Report:
    return {
        "ca": settings.ca,
        "certificate": settings.certificate,
        "key": settings.key,
        "peer_name": settings.peer_name,
    }

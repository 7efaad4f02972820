# SPDX-License-Identifier: Apache-2.0
"""One domain as libvirt lets it be migrated: the only module that calls libvirt.

libvirt-python blocks in a migration until it is over, so that runs in a thread of its own, and on a
connection of its own: on a shared one, questions and the abort wait for seconds behind it.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from types import TracebackType
from typing import Any

import libvirt  # type: ignore[import-untyped]
import libvirt_qemu  # type: ignore[import-untyped]

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Domain, parse_domain
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.waiting import Question, Setting, Waiting, answer_within

LOG = logging.getLogger(__name__)

_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 5, 3
_OPEN_PATIENCE = 10.0  # seconds
#: Seconds for QEMU's downtime limit, without which one can do.
_LIMIT_PATIENCE = 5.0
_MIB = 1 << 20
#: Why a domain is paused whose guest runs at the destination.
_RUNS_ELSEWHERE = (
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
)
_USUAL_DOWNTIME_MS = 300
_UNENDED = (
    "libvirt does not end it: see whether its QEMU hangs, and on which host the guest runs then"
)

_loop_lock = threading.Lock()
_loop_runs = False


class LibvirtGuest:
    """A domain on the host of one libvirt, to which it is connected anew when that was restarted.
    A context manager.

    :param connect: URI of the libvirt on the domain's host.
    :param name: the domain's name or UUID.
    :raises MigrationError: there is no such libvirt or domain, or it does not run.
    """

    def __init__(self, connect: str, name: str) -> None:
        self._instance = name
        self._connect = connect
        _start_event_loop()
        try:
            self._connection = self._open()
        except libvirt.libvirtError as error:
            raise self._error(f"libvirt at {connect} cannot be reached", error) from error
        # Questions ask in threads of their own
        self._lock = threading.Lock()
        self._closed = False
        self._handle: Any = None
        self._job = Question(self._look_at_job)
        self._aborting = Question(self._abort)
        self._limit = Setting(self._set_max_downtime)
        try:
            self._handle = self._look_up(name)
            if not self._handle.isActive():
                raise exception.MigrationError(instance=name, reason="the domain does not run")
            self.facts: Domain = parse_domain(self._handle.XMLDesc())
        except libvirt.libvirtError as error:
            self.close()
            raise self._error("its domain cannot be looked at", error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LibvirtGuest":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back. What is still being asked is answered, and nothing more."""
        with self._lock:
            self._closed = True
            # libvirt keeps a connection as long as there is a handle from it
            self._handle = None
        _close(self._connection)

    @property
    def runs_here(self) -> bool:
        """Whether the domain still runs on this host; true if libvirt does not tell."""
        try:
            state, reason = self._domain.state()
        except libvirt.libvirtError as error:
            return bool(error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN)
        if state == libvirt.VIR_DOMAIN_PAUSED:
            return reason not in _RUNS_ELSEWHERE
        return bool(state == libvirt.VIR_DOMAIN_RUNNING)

    def memory_layout(self) -> str:
        """What QEMU's monitor says to ``info mtree -f``.

        :raises MigrationError: if it says nothing.
        """
        try:
            answer: str = libvirt_qemu.qemuMonitorCommand(
                self._domain, "info mtree -f", libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            )
        except libvirt.libvirtError as error:
            raise self._error("its monitor does not answer", error) from error
        return answer

    @property
    def libvirt_version(self) -> int | None:
        """The libvirt on its host: a million times the major version, a thousand times the minor
        one, and the rest; None if it does not tell."""
        try:
            return int(self._domain.connect().getLibVersion())
        except libvirt.libvirtError as error:
            LOG.info("%s: libvirt does not tell its version: %s", self.facts.name, error)
            return None

    def max_downtime(self, waiting: Waiting) -> int:
        """QEMU's downtime limit, in milliseconds; its usual one if it does not tell in time.

        :param waiting: as in `answer_of`.
        """
        try:
            return answer_within(
                _LIMIT_PATIENCE, lambda: int(self._domain.migrateGetMaxDowntime()), waiting
            )
        except (libvirt.libvirtError, TimeoutError) as error:
            LOG.info("%s: the downtime limit is not told: %s", self.facts.name, error)
            return _USUAL_DOWNTIME_MS

    # libvirt asks QEMU's monitor without any limit of time: nobody waits for these

    def set_max_downtime(self, milliseconds: int) -> bool:
        """Set QEMU's downtime limit; whether that has been done. To be called until it has."""
        return self._limit.set(milliseconds)

    def _set_max_downtime(self, milliseconds: int) -> bool:
        try:
            self._domain.migrateSetMaxDowntime(milliseconds)
        except libvirt.libvirtError as error:
            LOG.debug("%s: no downtime limit of %d ms: %s", self.facts.name, milliseconds, error)
            return False
        return True

    def job(self) -> Job | None:
        """How far the migration is; None while there is none, or it is not told in a moment."""
        return self._job.answer()

    def _look_at_job(self) -> Job | None:
        try:
            stats = self._domain.jobStats()
        except libvirt.libvirtError:
            return None
        if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        return _job(stats)

    def completed_job(self) -> Job | None:
        """The same of the last migration that was completed; None if libvirt has forgotten."""
        try:
            # Others may ask as well: as a rule libvirt tells only once
            stats = self._domain.jobStats(
                libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
            )
        except libvirt.libvirtError:
            return None
        # Without the way of libvirt's last words, for which both hosts' clocks would have to agree
        downtime_ms = stats.get("downtime_net", stats.get("downtime"))
        return dataclasses.replace(_job(stats), downtime_ms=downtime_ms)

    def abort(self) -> None:
        """Cancel the migration, if there is one, sooner or later."""
        self._aborting.answer()

    def _abort(self) -> None:
        try:
            self._domain.abortJob()
        except libvirt.libvirtError as error:
            LOG.info("%s: the migration cannot be aborted: %s", self.facts.name, error)

    def migrate(self, order: "Order") -> "RunningMigration":
        """Begin a migration."""
        return RunningMigration(self._connect, self.facts.uuid, order)

    @property
    def _domain(self) -> Any:
        """libvirt's handle of it.

        :raises libvirtError: there is no libvirt, or no such domain any more, or it was closed.
        """
        with self._lock:
            connection, handle = self._connection, self._handle
        if handle is None:
            raise libvirt.libvirtError("the connection was given back")
        return handle if connection.isAlive() else self._connect_anew(connection)

    def _connect_anew(self, dead: Any) -> Any:
        """A handle from a connection that takes the place of one; from that of another thread that
        was quicker, if there is one. Nobody waits for another meanwhile.
        """
        connection = self._open()
        surplus = connection
        try:
            handle = connection.lookupByUUIDString(self.facts.uuid)
            with self._lock:
                if self._connection is dead and not self._closed:
                    self._connection, self._handle, surplus = connection, handle, dead
                handle = self._handle
        finally:
            _close(surplus)
        if handle is None:
            raise libvirt.libvirtError("the connection was given back")
        return handle

    def _open(self) -> Any:
        connection = open_libvirt(self._connect)
        _keep_alive(connection)
        return connection

    def _look_up(self, name: str) -> Any:
        try:
            return self._connection.lookupByUUIDString(name)
        except libvirt.libvirtError:
            return self._connection.lookupByName(name)

    def _error(self, what: str, error: libvirt.libvirtError) -> exception.MigrationError:
        return exception.MigrationError(instance=self._instance, reason=f"{what}: {error}")


@dataclasses.dataclass(frozen=True)
class Order:
    """What libvirt is asked for.

    :ivar destination: URI of the destination's libvirt, as the source's libvirt reaches it.
    :ivar uri: where QEMU sends its stream: ``unix:PATH``, ``tcp:HOST``; None leaves it to libvirt.
    :ivar bandwidth: QEMU's cap in bytes a second; 0 for none.
    """

    destination: str
    uri: str | None = None
    bandwidth: int = 0
    auto_converge: bool = False
    post_copy: bool = False
    tls: bool = False

    def arguments(self, persistent: bool) -> tuple[dict[str, Any], int]:
        """Parameters and flags of virDomainMigrateToURI3.

        :param persistent: the domain is defined, and shall be so at the destination alone.
        """
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
        for wanted, flag in (
            (persistent, libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE),
            (self.auto_converge, libvirt.VIR_MIGRATE_AUTO_CONVERGE),
            (self.post_copy, libvirt.VIR_MIGRATE_POSTCOPY),
            (self.tls, libvirt.VIR_MIGRATE_TLS),
        ):
            flags |= flag if wanted else 0
        parameters: dict[str, Any] = {}
        if self.uri is not None:
            parameters[libvirt.VIR_MIGRATE_PARAM_URI] = self.uri
        if self.bandwidth:
            parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = max(1, self.bandwidth // _MIB)
        return parameters, flags


class RunningMigration:
    """A migration that libvirt carries out, in a thread."""

    def __init__(self, connect: str, uuid: str, order: Order) -> None:
        self._connect = connect
        self._uuid = uuid
        self._order = order
        self._error: str | None = None
        self.began = time.monotonic()
        self.ended: float | None = None
        self._thread = threading.Thread(target=self._run, name="migrate", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def error(self) -> str | None:
        """After the end: why it failed, None if it has not. Before, that it does not end."""
        return _UNENDED if self._thread.is_alive() else self._error

    def _run(self) -> None:
        try:
            connection = open_libvirt(self._connect)
            with contextlib.closing(connection):
                _keep_alive(connection)
                domain = connection.lookupByUUIDString(self._uuid)
                parameters, flags = self._order.arguments(bool(domain.isPersistent()))
                domain.migrateToURI3(self._order.destination, parameters, flags)
        except libvirt.libvirtError as error:
            self._error = str(error)
        except Exception as error:  # whoever waits must not take it for a success
            LOG.exception("Domain %s: the migration cannot be begun", self._uuid)
            self._error = f"{type(error).__name__}: {error}"
        self.ended = time.monotonic()


def _keep_alive(connection: Any) -> None:
    """Have it noticed when a connection is dead. One to a driver in this process cannot be."""
    try:
        connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise


def _close(connection: Any) -> None:
    try:
        connection.close()
    except libvirt.libvirtError as error:
        LOG.debug("Closing the connection to libvirt: %s", error)


def _job(stats: dict[str, Any]) -> Job:
    return Job(
        remaining=int(stats.get("memory_remaining", 0)),
        transferred=int(stats.get("memory_processed", 0)),
        total=int(stats.get("memory_total", 0)),
        passes=int(stats.get("memory_iteration", 0)),
        statistics=stats,
    )


def open_libvirt(uri: str, patience: float | None = _OPEN_PATIENCE) -> Any:
    """A connection to a libvirt: libvirt's own call has no limit of time.

    :param patience: seconds; None for no limit.
    :raises libvirtError: it cannot be reached, or does not answer within that time.
    """
    outcome: queue.SimpleQueue[tuple[Any, libvirt.libvirtError | None]] = queue.SimpleQueue()
    given_up = threading.Event()

    def connect() -> None:
        try:
            connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            outcome.put((None, error))
            return
        outcome.put((connection, None))
        if given_up.is_set():
            connection.close()

    threading.Thread(target=connect, name="libvirt-open", daemon=True).start()
    try:
        connection, error = outcome.get(timeout=patience)
    except queue.Empty:
        given_up.set()
        raise libvirt.libvirtError(f"{uri} does not answer within {patience:g} s") from None
    if error is not None:
        raise error
    return connection


def hypervisor_of(uri: str, patience: float | None = _OPEN_PATIENCE) -> "Hypervisor":
    """What a libvirt tells of its host.

    :param patience: seconds for the connection; None for no limit.
    :raises HypervisorError: it cannot be reached, or does not tell.
    """
    _start_event_loop()
    try:
        connection = open_libvirt(uri, patience)
        with contextlib.closing(connection):
            return Hypervisor(
                int(connection.getLibVersion()), connection.getType(), int(connection.getVersion())
            )
    except libvirt.libvirtError as error:
        raise exception.HypervisorError(peer=uri, reason=str(error)) from error


@dataclasses.dataclass(frozen=True)
class Hypervisor:
    """Versions are a million times the major one, a thousand times the minor one, and the rest.

    :ivar kind: ``QEMU``, or what else libvirt drives. :ivar version: of that.
    """

    libvirt_version: int
    kind: str
    version: int


def _start_event_loop() -> None:
    """libvirt notices a dead connection by keep-alive messages, for which it wants a loop."""
    global _loop_runs
    with _loop_lock:
        if _loop_runs:
            return
        libvirt.registerErrorHandler(lambda context, error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        _loop_runs = True

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=run, name="libvirt-events", daemon=True).start()

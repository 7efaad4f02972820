# SPDX-License-Identifier: Apache-2.0
"""The destination relay: connections, threads and their end; what QEMU gets is decided in the core.

The core is one thread and the assembler that it runs. The others feed it (one a connection, the
volume readers) or carry away what it says (answers, return path).
"""

import functools
import json
import threading
from collections.abc import Callable, Sequence

from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.answers import Answers
from nova_dmigrate.relay.assembler import Assembler
from nova_dmigrate.relay.connections import Connections
from nova_dmigrate.relay.feed import Feed
from nova_dmigrate.relay.lifecycle import Lifecycle
from nova_dmigrate.relay.monitor import ControlServer, Report, Sampler, Stages, write_summary
from nova_dmigrate.relay.outlet import QemuOutlet
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.prefetch import BlockBatch, Prefetch
from nova_dmigrate.relay.receiver import FrameReceiver
from nova_dmigrate.relay.session import DestinationSession, RelaySettings
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import Buffer, FrameType, Role
from nova_dmigrate.relay.wire.handshake import Listener
from nova_dmigrate.volumes import open_volume
from nova_dmigrate.volumes.base import VolumeReader

LOG = log.getLogger(__name__)

_MAX_CONNECTIONS = 16
#: Characters of what is told of each volume that cannot be read.
_MAX_TROUBLE = 300


class DestinationRelay:
    """One migration, seen from the destination host: :meth:`prepare`, then :meth:`run`, once."""

    def __init__(
        self,
        session: DestinationSession,
        settings: RelaySettings,
        on_kept: Callable[[], None] = lambda: None,
    ) -> None:
        """:param on_kept: called before nobody can cancel any more."""
        self._session = session
        self._settings = settings
        self._on_kept = on_kept
        self._life = Lifecycle(session.instance)
        self._listener: Listener | None = None
        self._control: ControlServer | None = None
        self._wire = Connections()
        self._answers = Answers()
        self._feed = Feed()
        self._bucket = TokenBucket(settings.volume_bandwidth)
        self._outlet = QemuOutlet(session.qemu_socket, session.instance)
        self._readers: dict[str, VolumeReader] = {}
        self._unopened: dict[str, str] = {}
        self._stages = Stages("preparing")
        self._sampler = Sampler(self._sample)
        self._core = Assembler(
            session.instance,
            settings,
            self._readers,
            self._bucket,
            self._answers,
            self._stages,
            emit=self._emit,
            start_reading=self._start_reading,
            deliver=self._feed.put_blocks,
            on_post_copy=self._keep,
        )
        self._return_thread: threading.Thread | None = None

    # Before the migration

    def prepare(self) -> tuple[str, int]:
        """Open the instance's volumes and listen for the source relay; returns address and port.

        A volume that cannot be opened costs the gain, not the migration.

        :raises DMigrateError: it is not possible to listen.
        """
        for spec in self._session.volumes:
            try:
                self._readers[spec.volume_id] = open_volume(spec, self._settings.volume_access)
            except exception.VolumeError as error:
                self._unopened[spec.volume_id] = str(error)
                LOG.warning(
                    "Instance %s: pages of this volume will travel over the network: %s",
                    self._session.instance,
                    error,
                )
        try:
            self._listener = Listener(
                self._session.host,
                self._session.port,
                self._session.credentials,
                self._session.tls,
                self._settings.handshake_timeout,
                protocol.CAPABILITIES,
            )
            if self._session.control_socket is not None:
                self._control = ControlServer(
                    self._session.control_socket, self.progress, self.cancel, self._limit
                )
        except BaseException:
            self._close()
            raise
        self._life.on_failure(self._wake_all)
        self._stages.enter("waiting")
        return self._listener.address

    # The migration

    def run(self) -> Report:
        """Relay one migration; returns the summary, whose ``state`` tells how it ended."""
        self._sampler.start()
        self._life.start("accept", self._accept_source)
        self._life.start("core", self._run_core)
        self._life.limit_waiting(self._settings.idle_timeout)
        return self._finish(*self._life.outcome())

    def cancel(self) -> bool:
        """End the migration; both QEMUs see a broken connection.

        Returns whether that is so: where post-copy may begin, nobody but QEMU ends a migration.
        """
        return self._life.cancel()

    def _keep(self) -> None:
        # In this order: whoever wants to kill this process looks at what it has told
        self._on_kept()
        self._life.keep()

    def _limit(self, network: float, volume: float) -> None:
        del network
        self._bucket.limit(volume)

    def _run_core(self) -> None:
        while not self._core.ended:
            item = self._feed.next()
            if item is None:
                return
            if isinstance(item, BlockBatch):
                self._core.handle_blocks(item)
                continue
            try:
                self._core.handle_frame(item.frame)
            except ValueError as error:
                raise exception.FrameError(
                    peer=self._wire.peer, reason=f"{item.frame.header.type.name}: {error}"
                ) from error
            if item.done is not None:
                item.done()
        self._complete()

    def _start_reading(self, prefetch: Prefetch) -> None:
        self._life.on_failure(prefetch.stop)
        for number in range(prefetch.depth):
            # A read of a volume whose storage is gone comes back late or never.
            self._life.start(f"volume-{number}", prefetch.work, may_hang=True)

    # The source relay's connections

    def _accept_source(self) -> None:
        """Take the source relay's connections, as many as it makes."""
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept(None)
            except exception.WireError:
                return  # closed
            if connection.role is Role.ACKS and self._wire.acks is None:
                self._wire.acks = connection
                connection.set_timeout(None)
                self._life.start("answers", functools.partial(self._send_answers, connection))
            elif connection.role is Role.DATA and len(self._wire.data) < _MAX_CONNECTIONS:
                self._wire.data.append(connection)
                # The source shows on each of them that it is alive.
                connection.set_timeout(self._settings.stall_timeout)
                number = self._feed.add_connection()
                self._life.start(
                    f"receive-{number}", functools.partial(self._receive, number, connection)
                )
            else:
                LOG.warning("A connection too many from %s is closed", connection.peer)
                connection.close()
            if self._stages.current == "waiting":
                self._stages.enter("connected")

    def _receive(self, number: int, connection: Connection) -> None:
        receiver = FrameReceiver(connection)
        self._life.on_failure(receiver.close)
        while True:
            try:
                received = receiver.receive()
            except exception.PeerLost:
                if self._core.ended:
                    return
                raise
            if received.frame.header.type is not FrameType.KEEPALIVE:
                self._feed.put_frame(number, received)

    def _send_answers(self, connection: Connection) -> None:
        try:
            self._answers.send(connection)
        except exception.PeerLost:
            if not self._core.ended:
                raise

    # QEMU

    def _emit(self, buffers: Sequence[Buffer]) -> None:
        if not self._outlet.connected:
            self._dial()
        self._outlet.send(buffers)

    def _dial(self) -> None:
        self._life.begin()
        self._outlet.dial()
        # Once more, because a failure may have come before there was a socket to break.
        self._life.on_failure(self._outlet.abort)
        self._return_thread = self._life.start("return-path", self._relay_return_path)
        self._stages.enter("setup")

    def _relay_return_path(self) -> None:
        self._outlet.read_return_path(lambda data: self._answers.put(FrameType.RETURN_PATH, data))
        core = self._core
        if self._life.failed:
            return  # what the source has to hear is on its way
        if not (core.ram_complete or core.pass_through or core.ended):
            raise exception.QemuError(
                instance=self._session.instance,
                reason="QEMU closed its end before RAM was complete",
            )
        self._answers.put(FrameType.RETURN_END)

    # The end

    def _complete(self) -> None:
        """The stream is delivered: wait for QEMU's last word, then tell the source."""
        self._outlet.finish()
        if self._return_thread is not None:
            self._return_thread.join(self._settings.stall_timeout)
            if self._return_thread.is_alive():
                LOG.warning("Instance %s: QEMU keeps its socket open", self._session.instance)
                self._outlet.abort()
                self._return_thread.join()
        self._stages.enter("complete")
        if self._core.prefetch is not None:
            self._core.prefetch.stop()
            # What was told last is a moment old, and the source has this in its summary
            self._answers.put_progress(protocol.Progress(self._core.prefetch.bytes))
        if self._listener is not None:
            self._listener.close()
        self._answers.end(FrameType.DONE, json.dumps(self.progress()).encode())

    def _wake_all(self) -> None:
        """After a failure: make everything that blocks return, and tell the source why."""
        # First, because the source's QEMU may end its migration as soon as ours is cut off.
        self._answers.end(FrameType.FAILED, str(self._life.failure).encode()[:1024])
        self._outlet.abort()
        self._feed.close()
        if self._listener is not None:
            self._listener.close()
        self._wire.break_off(self._life.failure)

    def _finish(self, state: str, reason: str | None) -> Report:
        series = self._sampler.stop()
        summary = {**self.progress(), "state": state, "reason": reason, "series": series}
        self._close()
        if self._session.summary is not None:
            write_summary(self._session.summary, summary)
        LOG.info(
            "Instance %s: %s%s", self._session.instance, state, f": {reason}" if reason else ""
        )
        return summary

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._outlet.close()
        self._wire.close()
        for reader in self._readers.values():
            reader.close()
        if self._control is not None:
            self._control.close()

    def _sample(self, now: float) -> Report:
        del now
        prefetch = self._core.prefetch
        if prefetch is not None:
            rate = prefetch.measure()
            left = self._core.table.wanted_count * PAGE_SIZE
            self._answers.put_progress(protocol.Progress(prefetch.bytes, rate, left))
        return {
            "wire_bytes": sum(connection.bytes_received for connection in self._wire.data),
            "volume_bytes": prefetch.bytes if prefetch else 0,
            "qemu_bytes": self._outlet.bytes,
        }

    def _troubles(self) -> dict[str, str]:
        """Why volumes could not be opened, or not be read, by volume."""
        prefetch = self._core.prefetch
        return {**self._unopened, **(prefetch.troubles if prefetch else {})}

    def progress(self) -> Report:
        """How far the migration is: cumulative figures, bytes and pages."""
        table, prefetch = self._core.table, self._core.prefetch
        return {
            "role": "destination",
            "instance": self._session.instance,
            "state": "running",
            "stage": self._stages.current,
            "pass_through": self._core.pass_through,
            "mapped_pages": len(table),
            "wire_bytes": sum(connection.bytes_received for connection in self._wire.data),
            "qemu_bytes": self._outlet.bytes,
            "volume_bytes": prefetch.bytes if prefetch else 0,
            "volume_bandwidth": self._bucket.rate,
            "volume_reads": prefetch.reads if prefetch else 0,
            "volume_errors": prefetch.errors if prefetch else 0,
            "volume_troubles": {
                volume: why[:_MAX_TROUBLE] for volume, why in self._troubles().items()
            },
            "hits": table.hits,
            "speculated_pages": table.speculated,
            "replaced_pages": table.replaced,
            "withdrawn_pages": self._core.withdrawn,
            "unresolved_pages": table.open,
            "refused_connections": self._listener.refused if self._listener else 0,
            "seconds": {
                **self._stages.seconds(),
                "volume_busy": round(prefetch.busy_seconds, 4) if prefetch else 0.0,
            },
        }

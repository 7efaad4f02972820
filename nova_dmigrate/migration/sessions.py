# SPDX-License-Identifier: Apache-2.0
"""The two relays of one migration, as the services of both hosts keep them."""

import contextlib
import dataclasses
import json
import logging
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.waiting import Waiting, answer_of
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import SessionState
from nova_dmigrate.volumes import VolumeSpec

LOG = logging.getLogger(__name__)

_POLL = 0.2  # seconds
_AGAIN = 2.0  # seconds after which a lease is renewed again that was not
#: What a relay that was just started may take to be ready, in seconds.
_START_PATIENCE = 20.0
#: How often one that runs is asked what it can read: its host waits a second for it each time.
_QUESTIONS = 2


@dataclasses.dataclass(frozen=True)
class Terms:
    """On what terms relays are asked for.

    :ivar source_name, destination_name: of the hosts, in their certificates; None for no TLS.
    :ivar address: of the destination in the migration network; None for what it says.
    :ivar network_bandwidth, volume_bandwidth: caps in bytes a second; 0 for none.
    :ivar patience: seconds in the queue of a host that has no relay free.
    """

    source_name: str | None
    destination_name: str | None
    address: str | None
    network_bandwidth: int
    volume_bandwidth: int
    patience: float


class RelaySessions:
    """Source and destination relay of one migration: ordered, opened, and ended by :meth:`close`.
    In between their leases are renewed.

    Until both run, whatever has to be waited for (an order, an answer), ``waiting`` is called
    several times a second. What it raises gives all up.

    :param socket: where QEMU's stream goes and comes, a path that is the same on both hosts.
    :param guest_memory: bytes.
    :param lease: seconds after which the hosts end relays that nobody looks after.
    """

    def __init__(
        self,
        migration_id: str,
        instance: str,
        source: HostClient,
        destination: HostClient,
        socket: Path,
        guest_memory: int,
        lease: float,
        terms: "Terms",
    ) -> None:
        self._common: dict[str, Any] = {
            "migration_id": migration_id,
            "instance": instance,
            "token": secrets.token_hex(32),
            "session_id": str(uuid.uuid4()),
            "qemu_socket": str(socket),
            "lease_seconds": lease,
            "guest_memory": guest_memory,
        }
        self._instance = instance
        self._source = source
        self._destination = destination
        self._lease = lease
        self._open: list[HostClient] = []
        self._terms = terms
        self._volumes: tuple[host_messages.Volume, ...] = ()
        self._closed = threading.Event()
        self._domain = instance
        self.failure: str | None = None
        #: Why it is not known whether the source relay's host has taken the map that it was handed.
        self.map_pending: exception.HostError | None = None

    def order_destination(self, volumes: Sequence[VolumeSpec], waiting: Waiting) -> None:
        """Have the destination relay started, and wait while it is queued.

        :raises FallBack: it cannot be had.
        """
        self._volumes = tuple(
            host_messages.Volume(each.volume_id, each.driver, each.location) for each in volumes
        )
        order = host_messages.OpenDestination(
            **self._common,
            volumes=self._volumes,
            tls_peer_name=self._terms.source_name,
            volume_bandwidth=self._terms.volume_bandwidth,
            wait_seconds=self._terms.patience,
        )
        self._start(self._destination, order, waiting)

    def order_source(self, domain: str | None, connected: bool, waiting: Waiting) -> None:
        """Have the source relay started, too, and wait while it is queued.

        :param domain: libvirt's UUID of the guest; None for the instance's.
        :param connected: the destination has connected the volumes itself.
        :raises FallBack: one of them cannot be had.
        """
        self._domain = domain or self._domain
        ready = self._ready(self._destination, waiting)
        with self._translated(self._destination):
            reason = self.unreadable(self._first_word(ready, waiting))
        if reason is not None:
            raise reason
        order = host_messages.OpenSource(
            **self._common,
            host=self._terms.address or ready.host or self._destination.host,
            port=ready.port or 0,
            domain=domain,
            volumes=self._volumes,
            volumes_connected=connected,
            tls_peer_name=self._terms.destination_name,
            network_bandwidth=self._terms.network_bandwidth,
            wait_seconds=self._terms.patience,
        )
        self._start(self._source, order, waiting)

    def open(self, waiting: Waiting) -> None:
        """Wait until both relays are ready.

        :raises FallBack: one of them cannot be had.
        """
        self._ready(self._source, waiting)

    def use_map(self, buffer_map: Path, memory_layout: Path) -> bool | None:
        """Hand the source relay its map, at any time; whether its host has taken it, None if that
        is not known: a service that is being restarted, or whose relay is busy, may be asked again.
        """
        session_id = self._common["session_id"]
        if self.map_pending is None:
            self.map_pending = exception.HostUnreachable(
                host=self._source.host, reason="no answer whether its relay takes the buffer map"
            )
        try:
            self._source.use_map(session_id, str(buffer_map), str(memory_layout))
        except exception.HostError as error:
            refused = isinstance(error, exception.HostRefused)
            if refused and error.kwargs.get("code") != host_messages.RELAY_BUSY:
                LOG.warning("Instance %s: %s", self._instance, error)
                self.map_pending = None
                return False
            LOG.info("Instance %s: %s", self._instance, error)
            self.map_pending = error
            return None
        self.map_pending = None
        return True

    def look(self) -> dict[str, Any] | None:
        """What the source relay tells of itself, None if it does not.

        When a relay has failed, ``failure`` says why.
        """
        state = self._renew(self._source)
        if state is None:
            return None
        return _progress(state) or None

    def unreadable(self, told: Mapping[str, Any]) -> exception.FallBack | None:
        """Why the destination can read no volume, as far as its relay has told of itself; None if
        it can.
        """
        troubles = volume_troubles(told)
        if told.get("volume_bytes") or not troubles:
            return None
        if any(each.volume_id not in troubles for each in self._volumes):
            return None
        return because(
            Reason.VOLUMES_UNREADABLE,
            self._instance,
            host=self._destination.host,
            why="; ".join(troubles.values()),
        )

    def note_failure(self, why: str) -> None:
        """A relay has failed; the first one counts."""
        self.failure = self.failure or why

    def close(self) -> dict[str, dict[str, Any]]:
        """End both; their summaries by role, of those that have told one."""
        summaries = {}
        self._closed.set()
        while self._open:
            host = self._open.pop()
            try:
                state = host.close_session(self._common["session_id"])
                # Whether or not the host has its summary
                self._note(state)
                summary = host.summary(self._common["session_id"])
            except exception.HostError as error:
                # What the host still has goes with its lease
                LOG.warning("Instance %s: %s", self._instance, error)
                continue
            if state.state not in host_messages.FINAL:
                LOG.warning(
                    "Instance %s: the %s relay of host %s goes on, %s: %s",
                    self._instance,
                    state.role,
                    host.host,
                    state.state,
                    state.message or "its host does not say why",
                )
            if summary is not None:
                summaries[state.role] = summary
                if (state.role, state.state) == ("destination", "delivered"):
                    summary["downtime_ms"] = self._downtime(host)
        return summaries

    def _downtime(self, host: HostClient) -> float | None:
        """Milliseconds for which the guest stood still, as the host knows to which it has come."""
        try:
            return host.downtime(self._domain)
        except exception.HostError as error:
            # Before 1.4 it cannot be asked
            LOG.info("Instance %s: the downtime is not known: %s", self._instance, error)
            return None

    def _start(self, host: HostClient, order: host_messages.Order, waiting: Waiting) -> None:
        """Order a relay, and keep it; returns when it is not queued any more."""
        # From now on: when it is given up, it may have been opened all the same
        self._open.append(host)
        # One for each host: that one does not answer must not cost the other one's relay
        threading.Thread(
            target=self._keep, args=(host,), name=f"keep-{host.host}", daemon=True
        ).start()
        with self._translated(host):
            try:
                state = answer_of(lambda: host.open_session(order), waiting)
            except exception.HostError:
                self._open.remove(host)
                raise
            state = self._past("queued", host, state, self._terms.patience, waiting)
        if state.message == host_messages.STOPPING:
            raise because(Reason.HOST_DRAINING, self._instance, host=host.host)
        # At the end of the same time the host itself gives up what is queued
        if state.state == "queued" or state.message.startswith(host_messages.NO_ROOM):
            raise because(
                Reason.NO_ROOM, self._instance, host=host.host, detail=state.message or "all busy"
            )

    def _ready(self, host: HostClient, waiting: Waiting) -> SessionState:
        """Wait until a relay that was ordered runs."""
        with self._translated(host):
            state = answer_of(lambda: self._renewed(host), waiting)
            state = self._past("starting", host, state, _START_PATIENCE, waiting)
        if state.state != "running":
            why = f"relay of host {host.host}: {state.state} {state.message}"
            raise because(Reason.RELAY_FAILED, self._instance, error=why)
        return state

    def _past(
        self, stage: str, host: HostClient, state: SessionState, patience: float, waiting: Waiting
    ) -> SessionState:
        """The first state of a relay that is not ``stage``, or the last one within ``patience``
        seconds.
        """
        end = time.monotonic() + patience
        while state.state == stage and time.monotonic() < end:
            waiting()
            time.sleep(_POLL)
            state = answer_of(lambda: self._renewed(host), waiting)
        return state

    def _first_word(self, state: SessionState, waiting: Waiting) -> dict[str, Any]:
        """What the destination relay, which runs, tells of itself; empty if it does not.

        :param state: the first in which it has run; its host may not have asked it by then.
        """
        for _ in range(_QUESTIONS):
            if state.progress:
                break
            state = answer_of(lambda: self._renewed(self._destination), waiting)
        return _progress(state)

    def _renewed(self, host: HostClient) -> SessionState:
        return host.renew(self._common["session_id"], self._lease)

    @contextlib.contextmanager
    def _translated(self, host: HostClient) -> Iterator[None]:
        """What a host answers, or not, as a reason for the ordinary migration."""
        try:
            yield
        except exception.HostUnreachable as error:
            raise because(Reason.HOST_UNREACHABLE, self._instance, error=error) from error
        except exception.HostRefused as error:
            if error.kwargs.get("code") == host_messages.DRAINING:
                raise because(Reason.HOST_DRAINING, self._instance, host=host.host) from error
            raise because(Reason.HOST_REFUSED, self._instance, error=error) from error

    def _keep(self, host: HostClient) -> None:
        """Renew a lease until the sessions are closed: the thread of this name."""
        pause = self._lease / 4
        while not self._closed.wait(pause) and host in self._open:
            renewed = self._renew(host) is not None
            # An outage may be over in a moment, and the lease soon
            pause = self._lease / 4 if renewed else min(self._lease / 4, _AGAIN)

    def _renew(self, host: HostClient) -> SessionState | None:
        try:
            state = self._renewed(host)
        except exception.HostError as error:
            # A service that is being restarted comes back; its relay has gone on meanwhile
            if not self._closed.is_set():
                LOG.info("Instance %s: %s", self._instance, error)
            return None
        self._note(state)
        return state

    def _note(self, state: SessionState) -> None:
        if state.state == "failed":
            self.note_failure(f"{state.role} relay: {state.message}")


def volume_troubles(report: Mapping[str, Any]) -> dict[str, str]:
    """Why the destination relay cannot read volumes, by volume, in what it has told of itself.

    One of an older version tells nothing of that.
    """
    told = report.get("volume_troubles")
    if not isinstance(told, dict):
        return {}
    return {volume: why for volume, why in told.items() if isinstance(why, str)}


def _progress(state: SessionState) -> dict[str, Any]:
    """What a relay has told of itself; empty if it has not."""
    try:
        progress = json.loads(state.progress or "{}")
    except ValueError:
        return {}
    return progress if isinstance(progress, dict) else {}

# SPDX-License-Identifier: Apache-2.0
"""The two relays of one migration, as the services of both hosts keep them."""

import json
import logging
import secrets
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.volumes import VolumeSpec

LOG = logging.getLogger(__name__)

_POLL = 0.2  # seconds
#: What a relay that was just started may take to be ready, in seconds.
_START_PATIENCE = 20.0


class RelaySessions:
    """Source and destination relay of one migration. Opened by :meth:`open`, ended by
    :meth:`close`; in between :meth:`look` keeps them alive.

    :param socket: where QEMU's stream goes and comes, a path that is the same on both hosts.
    :param lease: seconds after which the hosts end relays that nobody looks after.
    """

    def __init__(
        self,
        migration_id: str,
        instance: str,
        source: HostClient,
        destination: HostClient,
        socket: Path,
        lease: float,
    ) -> None:
        self._common: dict[str, Any] = {
            "migration_id": migration_id,
            "instance": instance,
            "token": secrets.token_hex(32),
            "session_id": str(uuid.uuid4()),
            "qemu_socket": str(socket),
            "lease_seconds": lease,
        }
        self._instance = instance
        self._source = source
        self._destination = destination
        self._lease = lease
        self._open: list[HostClient] = []
        self._kept = 0.0
        self.failure: str | None = None

    def open(
        self,
        volumes: Sequence[VolumeSpec],
        buffer_map: Path,
        memory_layout: Path,
        tls_names: tuple[str, str] | None,
        address: str | None,
        bandwidths: tuple[int, int],
        patience: float,
    ) -> None:
        """Start both relays, the destination's first, and wait until they are ready.

        :param tls_names: names in the certificates of source and destination; None for no TLS.
        :param address: of the destination in the migration network; None for what it says.
        :param bandwidths: caps of network and volumes in bytes a second; 0 for none.
        :param patience: seconds in the queue of a host that has no relay free.
        :raises FallBack: one of them cannot be had.
        """
        network, volume = bandwidths
        source_name, destination_name = tls_names or (None, None)
        ready = self._start(
            self._destination,
            host_messages.OpenDestination(
                **self._common,
                volumes=tuple(
                    host_messages.Volume(each.volume_id, each.driver, each.location)
                    for each in volumes
                ),
                tls_peer_name=source_name,
                volume_bandwidth=volume,
                wait_seconds=patience,
            ),
            patience,
        )
        self._start(
            self._source,
            host_messages.OpenSource(
                **self._common,
                host=address or ready.host or self._destination.host,
                port=ready.port or 0,
                buffer_map=str(buffer_map),
                memory_layout=str(memory_layout),
                tls_peer_name=destination_name,
                network_bandwidth=network,
                wait_seconds=patience,
            ),
            patience,
        )

    def look(self) -> dict[str, Any] | None:
        """Keep both alive; what the source relay tells of itself, None if it does not.

        When a relay has failed, ``failure`` says why.
        """
        now = time.monotonic()
        if now > self._kept + self._lease / 4:
            self._kept = now
            self._renew(self._destination)
        state = self._renew(self._source)
        if state is None or not state.progress:
            return None
        try:
            progress = json.loads(state.progress)
        except ValueError:
            return None
        return progress if isinstance(progress, dict) else None

    def close(self) -> dict[str, dict[str, Any]]:
        """End both; their summaries by role, of those that have told one."""
        summaries = {}
        while self._open:
            host = self._open.pop()
            try:
                state = host.close_session(self._common["session_id"])
                summary = host.summary(self._common["session_id"])
            except exception.HostError as error:
                # What the host still has goes with its lease
                LOG.warning("Instance %s: %s", self._instance, error)
                continue
            self._note(state)
            if summary is not None:
                summaries[state.role] = summary
        return summaries

    def _start(self, host: HostClient, order: Any, patience: float) -> host_messages.SessionState:
        end = time.monotonic() + patience + _START_PATIENCE
        try:
            state = host.open_session(order)
            self._open.append(host)
            while state.state in ("queued", "starting") and time.monotonic() < end:
                time.sleep(_POLL)
                state = host.renew(self._common["session_id"], self._lease)
        except exception.HostUnreachable as error:
            raise because(Reason.HOST_UNREACHABLE, self._instance, error=error) from error
        except exception.HostRefused as error:
            raise because(Reason.HOST_REFUSED, self._instance, error=error) from error
        if state.state == "queued":
            raise because(
                Reason.NO_ROOM, self._instance, host=host.host, detail=state.message or "all busy"
            )
        if state.state != "running":
            why = f"relay of host {host.host}: {state.state} {state.message}"
            raise because(Reason.RELAY_FAILED, self._instance, error=why)
        return state

    def _renew(self, host: HostClient) -> host_messages.SessionState | None:
        try:
            state = host.renew(self._common["session_id"], self._lease)
        except exception.HostError as error:
            # A service that is being restarted comes back; its relay has gone on meanwhile
            LOG.info("Instance %s: %s", self._instance, error)
            return None
        self._note(state)
        return state

    def _note(self, state: host_messages.SessionState) -> None:
        if state.state == "failed" and self.failure is None:
            self.failure = f"{state.role} relay: {state.message}"

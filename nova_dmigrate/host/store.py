# SPDX-License-Identifier: Apache-2.0
"""What a host's service has started, on disk: one file a session, readable for the service only."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.host.relays import Identity, RelayFiles
from nova_dmigrate.retention import Retention

LOG = logging.getLogger(__name__)

_SUFFIX = ".json"


@dataclasses.dataclass
class Record:
    """What has to be known of a session after the service was started anew.

    :ivar description: what the relay is told, with the migration's token; None once it was told.
    :ivar created: seconds since the epoch; the order of the queue.
    :ivar socket: that of QEMU's stream. :ivar directory: that of ``socket``, if it is the
        session's own.
    :ivar host, port: where a destination relay listens.
    :ivar kept: whether only QEMU may end the relay, because a guest in post-copy needs it.
    :ivar guest_memory: bytes of the guest.
    """

    session_id: str
    migration_id: str
    instance: str
    role: str
    description: dict[str, Any] | None
    socket: str
    directory: str | None
    network_bandwidth: float
    volume_bandwidth: float
    lease_seconds: float
    wait_seconds: float
    created: float
    state: str = "queued"
    message: str = ""
    pid: int | None = None
    started: str | None = None
    host: str | None = None
    port: int | None = None
    kept: bool = False
    guest_memory: int = 0

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "Record":
        """What an earlier service has noted. A later version's has noted more, perhaps.

        :raises TypeError: something is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    @property
    def places(self) -> tuple[str | None, str]:
        """What no other session may have: its directory, if it has one, and its socket."""
        return self.directory, self.socket

    @property
    def identity(self) -> Identity | None:
        """Who the relay is, None before it was started."""
        if self.pid is None or self.started is None:
            return None
        return Identity(self.pid, self.started)


class Store:
    """The directories of the service. Only one service at a time can hold them."""

    def __init__(self, state: Path, sockets: Path) -> None:
        """:raises ConfigurationError: they cannot be made or written, or another service runs."""
        self._sessions = state / "sessions"
        self._summaries = state / "summaries"
        self.sockets = sockets
        try:
            state.mkdir(parents=True, exist_ok=True)
            # Whoever migrates has directories of its own in it, whatever the umask is. One that is
            # somebody else's is as they want it
            if not state.stat().st_mode & stat.S_IXOTH:
                with contextlib.suppress(PermissionError):
                    state.chmod(0o711)
            for path in (self._sessions, self._summaries):
                path.mkdir(mode=0o700, exist_ok=True)
            sockets.mkdir(mode=0o711, parents=True, exist_ok=True)
            # QEMU has to find its socket; who may connect is said by the socket itself
            sockets.chmod(0o711)
            self._lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise exception.ConfigurationError(
                reason=f"the host service needs its directories: {error}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise exception.ConfigurationError(
                reason=f"another host service is running (it holds {state})"
            ) from error

    def close(self) -> None:
        """Let another service have the directories."""
        os.close(self._lock)

    def files(self, session_id: str) -> RelayFiles:
        """Where the relay of a session tells of itself."""
        return RelayFiles(
            events=self._sessions / f"{session_id}.events",
            control=self.sockets / f"{session_id}.control",
            summary=self._summaries / f"{session_id}{_SUFFIX}",
        )

    def save(self, record: Record) -> None:
        """:raises OSError: it cannot be written."""
        path = self._path(record.session_id)
        partial = path.with_suffix(".partial")
        with open(partial, "w", opener=_open_private) as file:
            json.dump(dataclasses.asdict(record), file)
        partial.replace(path)

    def remove(self, record: Record) -> None:
        """Forget a session; its summary stays."""
        self._path(record.session_id).unlink(missing_ok=True)
        self.files(record.session_id).remove()

    def load(self) -> list[Record]:
        """The sessions of an earlier service, in the order of their creation. What belongs to none
        of them is removed.
        """
        records = []
        for path in self._sessions.glob(f"*{_SUFFIX}"):
            try:
                record = Record.parse(json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                LOG.warning("%s is not understood, and removed: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            records.append(record)
        known = {record.session_id for record in records}
        for path in self._sessions.iterdir():
            if path.stem not in known:
                path.unlink(missing_ok=True)
        return sorted(records, key=lambda record: record.created)

    def prune(self, kept: Retention) -> None:
        """Remove summaries that are not kept any more."""
        kept.prune(self._summaries.iterdir())

    def _path(self, session_id: str) -> Path:
        return self._sessions / f"{session_id}{_SUFFIX}"


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

# SPDX-License-Identifier: Apache-2.0
"""What a relay is told about the one migration that it serves, and how it may work."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.relay.wire.handshake import Credentials
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeSpec

_MIB = 1 << 20
_TOKEN_SIZE = 32


@dataclass(frozen=True)
class RelaySettings:
    """How relays of this host work. Sizes in bytes, times in seconds, rates in bytes a second (0:
    no cap).
    """

    window_size: int = 256 * _MIB
    read_ahead: int = 64 * _MIB
    channels: int = 2
    batch_size: int = _MIB
    queue_delay: float = 0.010
    hurry_threshold: float = 0.250
    hold_pages: int = 24576
    connect_timeout: float = 10.0
    handshake_timeout: float = 5.0
    stall_timeout: float = 30.0
    network_bandwidth: float = 0.0
    volume_queue_depth: int = 8
    volume_read_size: int = _MIB
    volume_merge_gap: int = 64 << 10
    volume_bandwidth: float = 0.0
    volume_error_limit: int = 64
    max_map_pages: int = 1 << 26
    max_map_volumes: int = 16
    max_map_chunk_size: int = _MIB


@dataclass(frozen=True)
class SessionBase:
    """What both ends are told.

    :ivar instance: the instance's UUID, for logs and messages.
    :ivar qemu_socket: path of the UNIX socket on which QEMU's stream comes (source) or goes
        (destination).
    :ivar control_socket: path of the socket that answers questions about progress; None for none.
    :ivar summary: path of the JSON summary that is written at the end; None for none.
    """

    instance: str
    credentials: Credentials
    qemu_socket: Path
    host: str
    port: int
    tls: TlsSettings | None
    control_socket: Path | None
    summary: Path | None


@dataclass(frozen=True)
class SourceSession(SessionBase):
    """``host`` and ``port`` are those of the destination relay.

    :ivar buffer_map: path of the saved buffer map; None for an ordinary guest.
    :ivar memory_layout: path of the output of ``info mtree -f`` that places the buffer map; None
        likewise.
    """

    buffer_map: Path | None
    memory_layout: Path | None


@dataclass(frozen=True)
class DestinationSession(SessionBase):
    """``host`` and ``port`` are where to listen (port 0: any free one).

    :ivar volumes: the instance's own volumes. No other is ever opened, whatever a map says.
    """

    volumes: tuple[VolumeSpec, ...]


def parse_session(text: str) -> SourceSession | DestinationSession:
    """Read a session's description, a JSON object.

    Common keys: ``role`` ("source" or "destination"), ``instance``, ``session_id``, ``token`` (64
    hexadecimal digits), ``qemu_socket``, ``host``, ``port``, and optionally ``tls`` (``ca``,
    ``certificate``, ``key``, ``peer_name``), ``control_socket``, ``summary``. Source: optionally
    ``buffer_map`` with ``memory_layout``. Destination: optionally ``volumes``, a list of
    ``volume_id``, ``driver``, ``location``.

    :raises SessionError: something is missing, unknown or of the wrong type.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise exception.SessionError(instance="?", reason=f"is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise exception.SessionError(instance="?", reason="is not a JSON object")
    return _Description(data).session()


class _Description:
    """A JSON object from which each key is taken once, so that what remains is unknown."""

    def __init__(
        self, data: Mapping[str, Any], instance: str | None = None, where: str = ""
    ) -> None:
        self._data = dict(data)
        self._where = where
        self._instance = instance or str(self._data.get("instance", "?"))

    def session(self) -> SourceSession | DestinationSession:
        role = self.text("role")
        common: dict[str, Any] = {
            "instance": self.text("instance"),
            "credentials": Credentials(self.text("session_id"), self._token()),
            "qemu_socket": Path(self.text("qemu_socket")),
            "host": self.text("host"),
            "port": self._port(),
            "tls": self._tls(),
            "control_socket": self.path("control_socket"),
            "summary": self.path("summary"),
        }
        session: SourceSession | DestinationSession
        if role == "source":
            session = SourceSession(
                **common,
                buffer_map=self.path("buffer_map"),
                memory_layout=self.path("memory_layout"),
            )
            if (session.buffer_map is None) != (session.memory_layout is None):
                raise self.error("buffer_map and memory_layout go together")
        elif role == "destination":
            session = DestinationSession(**common, volumes=self._volumes())
        else:
            raise self.error(f"role is {role!r}, neither 'source' nor 'destination'")
        self.nothing_left()
        return session

    def error(self, reason: str) -> exception.SessionError:
        return exception.SessionError(instance=self._instance, reason=self._where + reason)

    def text(self, key: str) -> str:
        value = self._data.pop(key, None)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} is missing or not a text")
        return value

    def path(self, key: str) -> Path | None:
        return (
            Path(self.text(key)) if self._data.get(key) is not None else self._data.pop(key, None)
        )

    def nothing_left(self) -> None:
        if self._data:
            raise self.error(f"unknown key {sorted(self._data)[0]!r}")

    def _token(self) -> bytes:
        try:
            token = bytes.fromhex(self.text("token"))
        except ValueError:
            token = b""
        if len(token) != _TOKEN_SIZE:
            raise self.error(f"token is not {2 * _TOKEN_SIZE} hexadecimal digits")
        return token

    def _port(self) -> int:
        port = self._data.pop("port", None)
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            raise self.error(f"port is {port!r}, not a number from 0 to 65535")
        return port

    def _inner(self, value: Any, where: str) -> "_Description":
        if not isinstance(value, dict):
            raise self.error(f"{where} is not a JSON object")
        return _Description(value, self._instance, f"{where}: ")

    def _tls(self) -> TlsSettings | None:
        value = self._data.pop("tls", None)
        if value is None:
            return None
        inner = self._inner(value, "tls")
        taken = {field.name: inner.text(field.name) for field in fields(TlsSettings)}
        inner.nothing_left()
        return TlsSettings(**taken)

    def _volumes(self) -> tuple[VolumeSpec, ...]:
        value = self._data.pop("volumes", None)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error("volumes is not a list")
        specs = []
        for number, item in enumerate(value):
            inner = self._inner(item, f"volumes[{number}]")
            specs.append(
                VolumeSpec(inner.text("volume_id"), inner.text("driver"), inner.text("location"))
            )
            inner.nothing_left()
        return tuple(specs)

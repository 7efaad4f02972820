# SPDX-License-Identifier: Apache-2.0
"""What a relay is told about the one migration that it serves, and how it may work."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.relay.wire.handshake import Credentials
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeAccess, VolumeSpec

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
    compression: bool = True
    batch_size: int = _MIB
    queue_delay: float = 0.010
    hurry_threshold: float = 0.250
    hold_pages: int = 24576
    connect_timeout: float = 10.0
    handshake_timeout: float = 5.0
    stall_timeout: float = 30.0
    idle_timeout: float = 900.0
    network_bandwidth: float = 0.0
    volume_queue_depth: int = 8
    volume_read_size: int = _MIB
    volume_merge_gap: int = 64 << 10
    volume_bandwidth: float = 0.0
    volume_error_limit: int = 64
    volume_access: VolumeAccess = VolumeAccess()
    max_map_pages: int = 1 << 26
    max_map_volumes: int = 16
    max_map_chunk_size: int = _MIB

    @property
    def map_limits(self) -> MapLimits:
        """What a buffer map may be at most."""
        return MapLimits(
            max_pages=self.max_map_pages,
            max_volumes=self.max_map_volumes,
            max_chunk_bytes=self.max_map_chunk_size,
        )


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


@dataclass(frozen=True)
class SessionDefaults:
    """What a session's description may leave to the host that the relay runs on.

    :ivar tls: whether a session in the clear is refused.
    :ivar ca, certificate, key: the host's files for TLS.
    :ivar summaries, runtime: directories of summaries and control sockets; None for none of them.
    """

    tls: bool = False
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    listen_host: str | None = None
    listen_port: int | None = None
    summaries: Path | None = None
    runtime: Path | None = None


def parse_session(
    text: str, defaults: SessionDefaults | None = None
) -> SourceSession | DestinationSession:
    """Read a session's description, a JSON object.

    Keys: ``role`` ("source" or "destination"), ``instance``, ``session_id``, ``token`` (64
    hexadecimal digits), ``qemu_socket``; ``host`` and ``port``, which the destination may leave to
    the host; ``tls``, an object with ``peer_name`` and optionally ``ca``, ``certificate``, ``key``;
    optionally ``control_socket`` and ``summary``. Source only: optionally ``buffer_map`` with
    ``memory_layout``. Destination only: optionally ``volumes``, a list of ``volume_id``,
    ``driver``, ``location`` and optionally ``secret``.

    :raises SessionError: something is missing, unknown, of the wrong type, or not allowed here.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise exception.SessionError(instance="?", reason=f"is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise exception.SessionError(instance="?", reason="is not a JSON object")
    return _Description(data, defaults or SessionDefaults()).session()


class _Description:
    """A JSON object from which each key is taken once, so that what remains is unknown."""

    def __init__(
        self,
        data: Mapping[str, Any],
        defaults: SessionDefaults,
        instance: str | None = None,
        where: str = "",
    ) -> None:
        self._data = dict(data)
        self._defaults = defaults
        self._where = where
        self._instance = instance or str(self._data.get("instance", "?"))

    def session(self) -> SourceSession | DestinationSession:
        role = self.text("role")
        if role not in ("source", "destination"):
            raise self.error(f"role is {role!r}, neither 'source' nor 'destination'")
        listens = role == "destination"
        session_id = self.text("session_id")
        common: dict[str, Any] = {
            "instance": self.text("instance"),
            "credentials": Credentials(session_id, self._token()),
            "qemu_socket": Path(self.text("qemu_socket")),
            "host": self.text("host", self._defaults.listen_host if listens else None),
            "port": self._port(self._defaults.listen_port if listens else None),
            "tls": self._tls(),
            "control_socket": self.path(
                "control_socket", self._defaults.runtime, f"{session_id}-{role}.sock"
            ),
            "summary": self.path("summary", self._defaults.summaries, f"{session_id}-{role}.json"),
        }
        session = self._destination(common) if listens else self._source(common)
        self.nothing_left()
        return session

    def _source(self, common: dict[str, Any]) -> SourceSession:
        session = SourceSession(
            **common,
            buffer_map=self.path("buffer_map"),
            memory_layout=self.path("memory_layout"),
        )
        if (session.buffer_map is None) != (session.memory_layout is None):
            raise self.error("buffer_map and memory_layout go together")
        return session

    def _destination(self, common: dict[str, Any]) -> DestinationSession:
        return DestinationSession(**common, volumes=self._volumes())

    def error(self, reason: str) -> exception.SessionError:
        return exception.SessionError(instance=self._instance, reason=self._where + reason)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._data.pop(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} is missing or not a text")
        return value

    def optional_text(self, key: str) -> str:
        """A text that may be missing; then it is empty."""
        if self._data.get(key) is not None:
            return self.text(key)
        self._data.pop(key, None)
        return ""

    def path(self, key: str, directory: Path | None = None, name: str = "") -> Path | None:
        """A path that may be missing; then it is ``name`` in ``directory``, if there is one."""
        if self._data.get(key) is not None:
            return Path(self.text(key))
        self._data.pop(key, None)
        # The session's id becomes part of a file's name, so it must not be more than that.
        return directory / name.replace("/", "_") if directory is not None else None

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

    def _port(self, default: int | None) -> int:
        port = self._data.pop("port", default)
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            raise self.error(f"port is {port!r}, not a number from 0 to 65535")
        return port

    def _inner(self, value: Any, where: str) -> "_Description":
        if not isinstance(value, dict):
            raise self.error(f"{where} is not a JSON object")
        return _Description(value, self._defaults, self._instance, f"{where}: ")

    def _tls(self) -> TlsSettings | None:
        value = self._data.pop("tls", None)
        if value is None:
            if self._defaults.tls:
                raise self.error("has no tls, and this host does not migrate in the clear")
            return None
        inner = self._inner(value, "tls")
        settings = TlsSettings(
            ca=inner.text("ca", self._defaults.ca),
            certificate=inner.text("certificate", self._defaults.certificate),
            key=inner.text("key", self._defaults.key),
            peer_name=inner.text("peer_name"),
        )
        inner.nothing_left()
        return settings

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
                VolumeSpec(
                    volume_id=inner.text("volume_id"),
                    driver=inner.text("driver"),
                    location=inner.text("location"),
                    secret=inner.optional_text("secret"),
                )
            )
            inner.nothing_left()
        return tuple(specs)

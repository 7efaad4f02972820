# SPDX-License-Identifier: Apache-2.0
"""Every error that this package raises on purpose, in one hierarchy.

Each class carries a sentence for the operator in ``msg_fmt``; whoever raises it names the parts
of that sentence as keywords, and they stay readable in ``kwargs`` for code that has to decide
by them. A message says what happened, to which instance, volume or peer, and why.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DMigrateError(Exception):
    """The base of all: catch this to catch what nova-dmigrate raises on purpose."""

    msg_fmt: ClassVar[str] = "An unknown error occurred in nova-dmigrate"

    def __init__(self, message: str | None = None, **kwargs: Any) -> None:
        """Format ``msg_fmt`` with the keywords, unless a whole message is given.

        An error path must never end in an error about its own message, so a keyword that is
        missing leaves the sentence unformatted, followed by the keywords that there are.
        """
        self.kwargs = kwargs
        super().__init__(self._format() if message is None else message)

    def _format(self) -> str:
        try:
            return self.msg_fmt % self.kwargs
        except (KeyError, TypeError, ValueError):
            known = ", ".join(f"{name}={value!r}" for name, value in sorted(self.kwargs.items()))
            return f"{self.msg_fmt} ({known})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy with the keywords, which Exception alone would lose."""
        return _rebuild, (type(self), str(self), self.kwargs)


def _rebuild(cls: type[DMigrateError], message: str, kwargs: dict[str, Any]) -> DMigrateError:
    return cls(message, **kwargs)


# Configuration and the description of one session


class ConfigurationError(DMigrateError):
    """An option or a combination of options cannot work."""

    msg_fmt = "Configuration: %(reason)s"


class SessionError(ConfigurationError):
    """The description of one migration, as handed to a relay, cannot work."""

    msg_fmt = "Session %(instance)s: %(reason)s"


# What is parsed: the stream, the buffer map, the memory layout


class StreamError(DMigrateError):
    """QEMU's migration stream broke off, or was asked for something that it cannot express."""

    msg_fmt = "Migration stream: %(reason)s"


class BufferMapError(DMigrateError):
    """A buffer map is malformed, contradictory, or beyond the limits."""

    msg_fmt = "Buffer map: %(reason)s"


class MemoryLayoutError(DMigrateError):
    """QEMU's description of the guest's physical memory could not be understood."""

    msg_fmt = "Memory layout: %(reason)s"


# Volumes


class VolumeError(DMigrateError):
    """Something went wrong with one volume at the destination."""

    msg_fmt = "Volume %(volume)s: %(reason)s"


class VolumeOpenError(VolumeError):
    """The volume could not be opened; its pages travel over the network."""


class VolumeReadError(VolumeError):
    """A range of the volume could not be read; its references are misses."""


class VolumeTimeoutError(VolumeReadError):
    """The volume has not answered: what else is asked of it would be waited for as long."""


class VolumeBoundsError(VolumeError):
    """A read would leave the volume's bounds, or is not aligned to volume blocks."""


# The wire between the two relays


class WireError(DMigrateError):
    """The connection to the other relay cannot go on."""

    msg_fmt = "Peer %(peer)s: %(reason)s"


class HandshakeError(WireError):
    """The two relays did not come to terms."""


class AuthenticationError(HandshakeError):
    """The peer could not prove that it belongs to this migration."""


class VersionMismatch(HandshakeError):
    """The two relays have no version of the wire protocol in common."""


class FrameError(WireError):
    """The peer sent a frame that the protocol does not allow."""


class PeerLost(WireError):
    """The peer closed the connection, was reset, or stayed silent for too long."""


# One migration


class RelayError(DMigrateError):
    """A relay had to give up its migration; the guest stays where it runs."""

    msg_fmt = "Relay of %(instance)s: %(reason)s"


class QemuError(RelayError):
    """QEMU's migration socket failed or was closed early."""


class MigrationCancelled(RelayError):
    """The migration was cancelled, by the operator or by QEMU."""


class UnsupportedStream(RelayError):
    """The stream uses a feature with which a relay in between cannot work at all."""


# The agent in the guest, and the way to it


class AgentError(DMigrateError):
    """The agent cannot do what it was asked."""

    msg_fmt = "Agent: %(reason)s"


class ServerNotFound(AgentError):
    """No database server runs in this guest, or none that was meant."""

    msg_fmt = "No database server: %(reason)s"


class ServerError(AgentError):
    """A database server cannot be reached, or refused what it was asked."""

    msg_fmt = "Database server %(server)s: %(reason)s"


class StorageError(AgentError):
    """Where a file lies on which volume cannot be found out, or the file cannot be mapped."""

    msg_fmt = "Storage of %(path)s: %(reason)s"


class PrivilegeError(AgentError):
    """The agent lacks a privilege of the operating system."""

    msg_fmt = "Missing privilege: %(reason)s"


class RpcError(DMigrateError):
    """A request to an agent or to a host service failed."""

    msg_fmt = "Request: %(reason)s"


class AgentRequestError(RpcError):
    """A request to the agent of an instance failed."""

    msg_fmt = "Agent of instance %(instance)s: %(reason)s"


class AgentUnreachable(AgentRequestError):
    """No agent answered in time."""


class AgentRefused(AgentRequestError):
    """The agent answered that it cannot, or something that makes no sense."""


# The host service, and the way to it


class HostError(RpcError):
    """A request to a host service failed."""

    msg_fmt = "Host %(host)s: %(reason)s"


class HostUnreachable(HostError):
    """No host service answered in time."""


class HostRefused(HostError):
    """The host service answered that it cannot, or something that makes no sense."""


class RequestRefused(DMigrateError):
    """The host service does not do what it is asked; ``code`` in ``kwargs`` is for programs."""

    msg_fmt = "%(reason)s"


# The whole migration, seen from the source host


class MigrationError(DMigrateError):
    """A migration cannot be begun, or has failed; the guest stays where it runs."""

    msg_fmt = "Migration of %(instance)s: %(reason)s"


class HypervisorError(DMigrateError):
    """libvirt at one host does not tell what that host has."""

    msg_fmt = "libvirt at %(peer)s: %(reason)s"


class FallBack(MigrationError):
    """The migration has to be the ordinary one; ``code`` in ``kwargs`` tells the reason."""


# What is kept and reported of migrations that have been


class SummaryError(DMigrateError):
    """A summary of a migration makes no sense."""

    msg_fmt = "Summary of a migration: %(reason)s"


class HistoryError(DMigrateError):
    """The history of migrations cannot be read or written, or has no such migration."""

    msg_fmt = "History: %(reason)s"


class ReportError(DMigrateError):
    """A report cannot be made."""

    msg_fmt = "Report: %(reason)s"

# SPDX-License-Identifier: Apache-2.0
"""The protocol between the two relays of a migration: see doc/source/contributor/wire.rst."""

from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import Buffer, Frame, FrameType, Header, Role
from nova_dmigrate.relay.wire.handshake import Agreement, Credentials, Listener, connect
from nova_dmigrate.relay.wire.tls import TlsSettings

__all__ = [
    "Agreement",
    "Buffer",
    "Connection",
    "Credentials",
    "Frame",
    "FrameType",
    "Header",
    "Listener",
    "Role",
    "TlsSettings",
    "connect",
]

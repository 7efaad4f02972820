# SPDX-License-Identifier: Apache-2.0
"""How two relays learn who the other is: four short messages, no secret among them.

    client: hello       versions, session, role, index, capabilities, nonce
    server: challenge   version, capabilities, nonce      or error and code
    client: proof       HMAC(token, "client", hello, challenge)
    server: proof       HMAC(token, "server", hello, challenge)      or error and code

The proofs are over the exact bytes of hello and challenge: nobody in between can change a version,
a capability or a role unnoticed, and fresh nonces make each proof good for one connection only.
This module does not touch sockets; :mod:`nova_dmigrate.relay.wire.handshake` does.
"""

import dataclasses
import hashlib
import hmac
import json
import secrets
import struct
from typing import Protocol

from nova_dmigrate import exception
from nova_dmigrate.relay.wire.frames import Role

#: Versions of the protocol that this code speaks.
VERSIONS = (1,)

MAGIC = b"NDMG"
#: magic, length of the JSON text that follows
PREFIX = struct.Struct("<4sH")
MAX_MESSAGE = 4096

TOKEN_SIZE = 32
_NONCE_SIZE = 32
_MAX_TEXT = 256
_MAX_ITEMS = 32
MAX_INDEX = 255


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What both relays of one migration know. The token (32 bytes) never crosses the wire."""

    session_id: str
    token: bytes = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if len(self.token) != TOKEN_SIZE:
            raise ValueError(f"a token of {len(self.token)} bytes instead of {TOKEN_SIZE}")
        if not 0 < len(self.session_id) <= _MAX_TEXT:
            raise ValueError(f"a session identifier of {len(self.session_id)} characters")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the two relays speak: the highest common version, and the capabilities of both."""

    version: int
    capabilities: frozenset[str]


class Refusal(Exception):
    """The other side is refused. ``code`` is for programs, ``reason`` is for people."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason

    def as_error(self, peer: str) -> exception.HandshakeError:
        """Return the public exception for this refusal."""
        return _ERRORS.get(self.code, exception.HandshakeError)(peer=peer, reason=self.reason)


_ERRORS: dict[str, type[exception.HandshakeError]] = {
    "version": exception.VersionMismatch,
    "session": exception.AuthenticationError,
    "token": exception.AuthenticationError,
    "certificate": exception.AuthenticationError,
}


class Channel(Protocol):
    """Something that carries bytes and gives up by itself when the handshake takes too long."""

    def read(self, size: int) -> bytes:
        """Return exactly ``size`` bytes. :raises EOFError: the other side has closed."""

    def write(self, data: bytes) -> None:
        """Send all of ``data``."""


def encode(fields: dict[str, object]) -> bytes:
    """Return the message that carries ``fields``."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    if len(text) > MAX_MESSAGE:
        raise ValueError(f"a handshake message of {len(text)} bytes")
    return PREFIX.pack(MAGIC, len(text)) + text


def _read(channel: Channel) -> tuple[bytes, dict[str, object]]:
    prefix = channel.read(PREFIX.size)
    magic, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise Refusal("malformed", "what it sent does not come from a relay")
    if not 0 < length <= MAX_MESSAGE:
        raise Refusal("malformed", f"it sent a handshake message of {length} bytes")
    text = channel.read(length)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "it sent a handshake message that is not JSON") from None
    if not isinstance(fields, dict):
        raise Refusal("malformed", "it sent a handshake message that is not an object")
    return prefix + text, fields


def _read_answer(channel: Channel) -> tuple[bytes, dict[str, object]]:
    """Read what the server says, which may be that it refuses."""
    raw, fields = _read(channel)
    if "error" in fields:
        reason = _printable(_text(fields, "error"))
        raise Refusal(_text(fields, "code"), f"it refused this side: {reason}")
    return raw, fields


def greet(
    channel: Channel,
    credentials: Credentials,
    role: Role,
    index: int,
    capabilities: frozenset[str],
) -> Agreement:
    """Speak the client's part. :raises Refusal: one side refused the other."""
    hello = encode(
        {
            "versions": list(VERSIONS),
            "session": credentials.session_id,
            "role": int(role),
            "index": index,
            "capabilities": sorted(capabilities),
            "nonce": secrets.token_hex(_NONCE_SIZE),
        }
    )
    channel.write(hello)
    challenge, fields = _read_answer(channel)
    agreement = Agreement(_integer(fields, "version", 0xFFFF), _capabilities(fields))
    _check_nonce(fields)
    if agreement.version not in VERSIONS:
        raise Refusal("version", f"it chose version {agreement.version}, unknown at this side")
    if not agreement.capabilities <= capabilities:
        raise Refusal("malformed", "it chose capabilities that this side did not offer")
    channel.write(encode({"proof": _proof(credentials, b"client", hello, challenge).hex()}))
    _, fields = _read_answer(channel)
    _check_proof(fields, _proof(credentials, b"server", hello, challenge))
    return agreement


def answer(
    channel: Channel, credentials: Credentials, capabilities: frozenset[str]
) -> tuple[Role, int, Agreement]:
    """Speak the server's part but for telling a refusal to the client.

    :returns: role, index, agreement
    :raises Refusal: the client is refused
    """
    hello, fields = _read(channel)
    version = _common_version(fields)
    if not hmac.compare_digest(_text(fields, "session").encode(), credentials.session_id.encode()):
        raise Refusal("session", "the session is not known here")
    try:
        role = Role(_integer(fields, "role", 255))
    except ValueError:
        raise Refusal("role", "the role is not known here") from None
    index = _integer(fields, "index", MAX_INDEX)
    agreement = Agreement(version, _capabilities(fields) & capabilities)
    _check_nonce(fields)
    challenge = encode(
        {
            "version": version,
            "capabilities": sorted(agreement.capabilities),
            "nonce": secrets.token_hex(_NONCE_SIZE),
        }
    )
    channel.write(challenge)
    _, fields = _read(channel)
    _check_proof(fields, _proof(credentials, b"client", hello, challenge))
    channel.write(encode({"proof": _proof(credentials, b"server", hello, challenge).hex()}))
    return role, index, agreement


def encode_refusal(refusal: Refusal) -> bytes:
    """Return the message by which a server refuses."""
    return encode({"error": refusal.reason[:_MAX_TEXT], "code": refusal.code})


def _proof(credentials: Credentials, side: bytes, hello: bytes, challenge: bytes) -> bytes:
    # Fixed lengths: no two different pairs of messages give the same input. The side keeps one
    # from sending back the other's proof as its own.
    text = b"nova-dmigrate wire " + side
    text += hashlib.sha256(hello).digest() + hashlib.sha256(challenge).digest()
    return hmac.digest(credentials.token, text, "sha256")


def _check_proof(fields: dict[str, object], expected: bytes) -> None:
    if not hmac.compare_digest(_text(fields, "proof").encode(), expected.hex().encode()):
        raise Refusal("token", "the token is wrong")


def _common_version(fields: dict[str, object]) -> int:
    versions = fields.get("versions")
    if not isinstance(versions, list) or not 0 < len(versions) <= _MAX_ITEMS:
        raise Refusal("malformed", "versions is not a list of the right length")
    if not all(type(version) is int for version in versions):
        raise Refusal("malformed", "versions is not a list of integers")
    common = set(VERSIONS) & set(versions)
    if not common:
        ours = ", ".join(map(str, VERSIONS))
        theirs = ", ".join(str(version)[:8] for version in versions[:8])
        raise Refusal("version", f"no common protocol version: client {theirs}, server {ours}")
    return max(common)


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not _is_encodable(value):
        raise Refusal("malformed", f"{name} is not a text of at most {_MAX_TEXT} characters")
    return value


def _is_encodable(value: str) -> bool:
    # JSON can spell lone surrogates, which have no bytes.
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _integer(fields: dict[str, object], name: str, maximum: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value is True or value is False:
        raise Refusal("malformed", f"{name} is not an integer")
    if not 0 <= value <= maximum:
        raise Refusal("malformed", f"{name} is not an integer from 0 to {maximum}")
    return value


def _check_nonce(fields: dict[str, object]) -> None:
    if len(_text(fields, "nonce")) != 2 * _NONCE_SIZE:
        raise Refusal("malformed", f"nonce is not {2 * _NONCE_SIZE} characters long")


def _capabilities(fields: dict[str, object]) -> frozenset[str]:
    value = fields.get("capabilities")
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise Refusal("malformed", f"capabilities is not a list of at most {_MAX_ITEMS} items")
    if not all(isinstance(item, str) and len(item) <= _MAX_TEXT for item in value):
        raise Refusal("malformed", "capabilities is not a list of short texts")
    return frozenset(value)


def _printable(text: str) -> str:
    """Return a stranger's text such that it cannot forge lines of a log."""
    return "".join(character if character.isprintable() else "?" for character in text)

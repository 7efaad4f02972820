# SPDX-License-Identifier: Apache-2.0
import io
import json
import queue
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import Agreement, Credentials, Role, hello
from tests import base
from tests.unit.relay.wire import support

_FUZZ = hypothesis.settings(deadline=None, derandomize=True, max_examples=300)
_CREDENTIALS = Credentials("session", b"t" * 32)
_NONE: frozenset[str] = frozenset()
_HELLO = {
    "versions": [1],
    "session": "session",
    "role": 1,
    "index": 0,
    "capabilities": [],
    "nonce": "0" * 64,
}

_JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(max_size=10),
    lambda inner: (
        strategies.lists(inner, max_size=4)
        | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


class _Script:
    """A channel whose other side says ``data`` whatever it hears."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)
        self.written: list[bytes] = []

    def read(self, size: int) -> bytes:
        data = self._data.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def write(self, data: bytes) -> None:
        self.written.append(data)


class _Line:
    """One end of a line between client and server; ``tamper`` may change what is written."""

    def __init__(self) -> None:
        self.incoming: queue.Queue[bytes] = queue.Queue()
        self.peer: _Line = self
        self.tamper: Callable[[bytes], bytes] = bytes
        self.written: list[bytes] = []
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._rest += self.incoming.get(timeout=support.LONG)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.peer.incoming.put(self.tamper(data))


def _line() -> tuple[_Line, _Line]:
    client, server = _Line(), _Line()
    client.peer, server.peer = server, client
    return client, server


def _answer(line: _Line, *args: Any) -> Any:
    """Answer as a relay does, which tells the client of a refusal."""
    try:
        return hello.answer(line, *args)
    except hello.Refusal as refusal:
        line.write(hello.encode_refusal(refusal))
        raise


def _change(message: bytes, **fields: object) -> bytes:
    return hello.encode({**json.loads(message[hello.PREFIX.size :]), **fields})


class HelloTest(base.TestCase):
    def _talk(
        self, client: _Line, server: _Line, offered: frozenset[str] = _NONE, **changes: Any
    ) -> tuple[Any, Any]:
        """Return what client and server get, which may be an exception."""
        credentials = changes.get("credentials", _CREDENTIALS)
        with support.in_thread(
            lambda: _answer(server, _CREDENTIALS, frozenset({"delta", "zstd"}))
        ) as result:
            try:
                mine: Any = hello.greet(client, credentials, Role.ACKS, 3, offered)
            except hello.Refusal as refusal:
                mine = refusal
                # A client that gives up hangs up.
                server.incoming.put(b"\0" * 10_000)
            return mine, result()

    def test_both_sides_agree_on_the_common_capabilities(self) -> None:
        mine, theirs = self._talk(*_line(), frozenset({"delta", "unheard-of"}))
        self.assertEqual(Agreement(1, frozenset({"delta"})), mine)
        self.assertEqual((Role.ACKS, 3, mine), theirs)

    def test_the_token_is_in_no_message(self) -> None:
        client, server = _line()
        self._talk(client, server)
        said = b"".join(client.written + server.written)
        self.assertNotIn(_CREDENTIALS.token, said)
        self.assertNotIn(_CREDENTIALS.token.hex().encode(), said)
        self.assertNotIn("tttt", repr(_CREDENTIALS))

    def test_a_wrong_token_is_refused(self) -> None:
        mine, theirs = self._talk(*_line(), credentials=Credentials("session", b"u" * 32))
        self.assertEqual(("token", "token"), (mine.code, theirs.code))
        self.assertIsInstance(mine.as_error("peer"), exception.AuthenticationError)

    def test_a_capability_taken_away_on_the_way_is_noticed(self) -> None:
        client, server = _line()
        client.tamper = lambda data: _change(data, capabilities=[]) if b"nonce" in data else data
        mine, theirs = self._talk(client, server, frozenset({"delta"}))
        self.assertEqual(("token", "token"), (mine.code, theirs.code))

    def test_a_challenge_changed_on_the_way_is_noticed(self) -> None:
        client, server = _line()
        server.tamper = lambda data: _change(data, nonce="1" * 64) if b"nonce" in data else data
        mine, theirs = self._talk(client, server)
        self.assertEqual(("token", "token"), (mine.code, theirs.code))

    def test_a_server_without_the_token_is_refused_by_the_client(self) -> None:
        client, server = _line()

        def echo_the_proof(data: bytes) -> bytes:
            # An impostor that lets everybody in, and knows no better proof than the client's own.
            return client.written[-1] if b"proof" in data else data

        server.tamper = echo_the_proof
        mine, _ = self._talk(client, server)
        self.assertEqual("token", mine.code)
        self.assertIsInstance(mine.as_error("peer"), exception.AuthenticationError)

    def test_a_proof_is_good_for_one_connection_only(self) -> None:
        client, server = _line()
        self._talk(client, server)
        replay = _Script(b"".join(client.written))
        refusal = self.assertRaises(hello.Refusal, hello.answer, replay, _CREDENTIALS, _NONE)
        self.assertEqual("token", refusal.code)

    def test_a_server_of_another_version_is_refused_by_the_client(self) -> None:
        challenge = hello.encode({"version": 2, "capabilities": [], "nonce": "0" * 64})
        refusal = self.assertRaises(
            hello.Refusal, hello.greet, _Script(challenge), _CREDENTIALS, Role.DATA, 0, _NONE
        )
        self.assertIsInstance(refusal.as_error("peer"), exception.VersionMismatch)

    def test_a_server_that_invents_capabilities_is_refused_by_the_client(self) -> None:
        challenge = hello.encode({"version": 1, "capabilities": ["x"], "nonce": "0" * 64})
        refusal = self.assertRaises(
            hello.Refusal, hello.greet, _Script(challenge), _CREDENTIALS, Role.DATA, 0, _NONE
        )
        self.assertIn("did not offer", refusal.reason)

    def test_a_refusal_cannot_forge_a_line_of_the_log(self) -> None:
        message = hello.encode({"error": "no\nERROR disk on fire\x1b[2J", "code": "token"})
        refusal = self.assertRaises(
            hello.Refusal, hello.greet, _Script(message), _CREDENTIALS, Role.DATA, 0, _NONE
        )
        self.assertEqual("it refused this side: no?ERROR disk on fire?[2J", refusal.reason)

    def test_each_fault_of_a_hello_is_named(self) -> None:
        for code, reason, fields in (
            ("version", "client 2, 10000000, server 1", {"versions": [2, 10**300]}),
            ("malformed", "versions", {"versions": []}),
            ("malformed", "versions", {"versions": [1] * 33}),
            ("malformed", "versions", {"versions": [[1]]}),
            ("malformed", "versions", {"versions": [True]}),
            ("session", "not known", {"session": "other"}),
            ("malformed", "session", {"session": "s" * 257}),
            ("malformed", "session", {"session": "\ud800"}),
            ("role", "role", {"role": 3}),
            ("malformed", "index", {"index": 256}),
            ("malformed", "index", {"index": True}),
            ("malformed", "index", {"index": 1.0}),
            ("malformed", "nonce", {"nonce": "0" * 63}),
            ("malformed", "capabilities", {"capabilities": ["c"] * 33}),
            ("malformed", "capabilities", {"capabilities": [[]]}),
        ):
            script = _Script(hello.encode({**_HELLO, **fields}))
            refusal = self.assertRaises(hello.Refusal, hello.answer, script, _CREDENTIALS, _NONE)
            self.assertEqual(code, refusal.code)
            self.assertIn(reason, refusal.reason)
            hello.encode_refusal(refusal)

    def test_what_is_no_message_of_ours_is_refused_before_it_is_read(self) -> None:
        for reason, data in (
            ("not come from a relay", b"GET / HTTP/1.1\r\n"),
            ("of 65535 bytes", hello.PREFIX.pack(hello.MAGIC, 65535)),
            ("of 4097 bytes", hello.PREFIX.pack(hello.MAGIC, 4097)),
            ("of 0 bytes", hello.PREFIX.pack(hello.MAGIC, 0)),
            ("not JSON", hello.PREFIX.pack(hello.MAGIC, 4096) + b"[" * 4096),
            ("not JSON", hello.PREFIX.pack(hello.MAGIC, 3) + b'"\xff"'),
            ("not an object", hello.PREFIX.pack(hello.MAGIC, 2) + b"[]"),
        ):
            refusal = self.assertRaises(
                hello.Refusal, hello.answer, _Script(data), _CREDENTIALS, _NONE
            )
            self.assertEqual("malformed", refusal.code)
            self.assertIn(reason, refusal.reason)

    def test_credentials_of_the_wrong_size_are_refused(self) -> None:
        self.assertRaises(ValueError, Credentials, "session", b"short")
        self.assertRaises(ValueError, Credentials, "", b"t" * 32)

    @hypothesis.given(fields=strategies.dictionaries(strategies.sampled_from(list(_HELLO)), _JSON))
    @_FUZZ
    def test_any_fields_are_answered_or_refused(self, fields: dict[str, Any]) -> None:
        try:
            message = hello.encode({**_HELLO, **fields})
        except ValueError:
            hypothesis.reject()
        script = _Script(message)
        try:
            hello.answer(script, _CREDENTIALS, _NONE)
        except (hello.Refusal, EOFError):
            return
        self.fail("no proof was asked for")

    @hypothesis.given(data=strategies.binary(max_size=300), magic=strategies.booleans())
    @_FUZZ
    def test_noise_is_refused_on_both_sides(self, data: bytes, magic: bool) -> None:
        if magic:
            data = hello.PREFIX.pack(hello.MAGIC, max(1, len(data) - 5)) + data
        for talk in (
            lambda script: hello.answer(script, _CREDENTIALS, _NONE),
            lambda script: hello.greet(script, _CREDENTIALS, Role.DATA, 0, _NONE),
        ):
            try:
                talk(_Script(data))
            except (hello.Refusal, EOFError):
                continue
            self.fail("noise was let in")

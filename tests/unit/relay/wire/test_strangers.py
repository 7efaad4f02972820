# SPDX-License-Identifier: Apache-2.0
"""Whoever should not be there costs nothing but his own connection."""

import contextlib
import json
import random
import socket
import threading

from nova_dmigrate.relay.wire import hello
from tests.unit.relay.wire import support

#: The time for a handshake where a stranger uses it up.
IMPATIENT = 2.0


class StrangersTest(support.WireTestCase):
    def test_silent_stranger_holds_up_nobody_and_is_sent_away(self) -> None:
        listener = self.listen(timeout=IMPATIENT)
        with support.stranger(listener) as sock:
            self.assert_right_peer_gets_in(listener)
            self.assert_refused(listener, 1, "the handshake was not done within 2 s")
            self._assert_told("timeout", support.read_all(sock))
        self.assert_right_peer_gets_in(listener)

    def test_slow_stranger_has_no_more_time_than_others(self) -> None:
        listener = self.listen(timeout=IMPATIENT)
        message = self._first_bytes()
        with support.stranger(listener) as sock:
            done = threading.Event()

            def trickle() -> None:
                with contextlib.suppress(OSError):
                    for byte in message:
                        sock.sendall(bytes([byte]))
                        if done.wait(IMPATIENT / 20):
                            break

            with support.in_thread(trickle):
                self.assert_right_peer_gets_in(listener)
                self.assert_refused(listener, 1, "the handshake was not done within 2 s")
                done.set()

    def _first_bytes(self) -> bytes:
        if self.use_tls:
            # A handshake record of 512 bytes, which is never completed in time.
            return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(501)
        return hello.PREFIX.pack(hello.MAGIC, 1000) + b" " * 1000

    def test_stranger_who_leaves_is_forgotten(self) -> None:
        listener = self.listen()
        support.stranger(listener).close()
        self.assert_refused(listener, 1, "it closed the connection during the handshake")
        support.stranger(listener, self._first_bytes()[:9]).close()
        self.assert_refused(listener, 2, "it closed the connection during")
        self.assert_right_peer_gets_in(listener)

    def test_garbage_is_refused(self) -> None:
        listener = self.listen()
        generator = random.Random(11)
        for number in range(20):
            # The first byte decides whether it is for TLS or for us: here it is neither.
            data = b"G" + generator.randbytes(generator.randrange(10, 3000))
            with support.stranger(listener, data) as sock:
                self._assert_told("malformed", support.read_all(sock))
            self.assert_refused(listener, number + 1, "what it sent ")
        self.assert_right_peer_gets_in(listener)

    def test_garbage_that_begins_like_the_real_thing_is_refused(self) -> None:
        listener = self.listen()
        generator = random.Random(12)
        for number in range(20):
            data = self._first_bytes()[: generator.randrange(1, 6)] + generator.randbytes(3000)
            with support.stranger(listener, data) as sock:
                sock.shutdown(socket.SHUT_WR)
                support.read_all(sock)
            support.wait_for(lambda count=number + 1: listener.refused == count)
        self.assert_right_peer_gets_in(listener)

    def test_huge_lengths_are_refused_at_once(self) -> None:
        listener = self.listen()
        if self.use_tls:
            data, reason = b"\x16\x03\x01\xff\xff", "TLS failed"
        else:
            data, reason = hello.PREFIX.pack(hello.MAGIC, 0xFFFF), "message of 65535 bytes"
        with support.stranger(listener, data) as sock:
            support.read_all(sock)
        self.assert_refused(listener, 1, reason)
        self.assert_right_peer_gets_in(listener)

    def test_many_silent_strangers_give_way_to_the_right_peer(self) -> None:
        # Without giving way the right peer would wait for LONG, and give up before.
        listener = self.listen(max_handshakes=16)
        with contextlib.ExitStack() as strangers:
            for _ in range(40):
                strangers.enter_context(support.stranger(listener))
            source, _ = self.connect(listener, timeout=support.LONG / 2)
            destination, _ = listener.accept(support.LONG)
            self.addCleanup(destination.close)
            self.assert_carries(source, destination)
            self.assertLessEqual(len(listener._handshakes), 16)
        self.assertIn("too many connections: it gave way to newer ones", self.log.output)
        support.wait_for(lambda: listener.refused == 40)

    def test_a_flood_of_strangers_is_not_a_flood_of_log_lines(self) -> None:
        listener = self.listen()
        for number in range(70):
            support.stranger(listener, b"garbage").close()
            support.wait_for(lambda count=number + 1: listener.refused == count)
        support.wait_for(lambda: not listener._handshakes)
        # The first 16, then 32 and 64.
        self.assertEqual(18, self.log.output.count("Refused the connection of"))

    def test_threads_of_strangers_end(self) -> None:
        before = threading.active_count()
        listener = self.listen()
        socks = [support.stranger(listener) for _ in range(10)]
        support.wait_for(lambda: len(listener._handshakes) == 10)
        listener.close()
        support.wait_for(lambda: threading.active_count() <= before)
        for sock in socks:
            support.read_all(sock)
            sock.close()

    def _assert_told(self, code: str, data: bytes) -> None:
        magic, length = hello.PREFIX.unpack(data[: hello.PREFIX.size])
        self.assertEqual((hello.MAGIC, len(data) - hello.PREFIX.size), (magic, length))
        self.assertEqual(code, json.loads(data[hello.PREFIX.size :])["code"])


class TlsStrangersTest(StrangersTest):
    use_tls = True

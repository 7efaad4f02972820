# SPDX-License-Identifier: Apache-2.0
import os
import signal
import socket
import subprocess
import sys

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import Agreement, Credentials, FrameType, Listener, Role, hello
from tests.unit.relay.wire import support

# A peer that sends half a frame, or as much as fits, and waits to be killed.
_PEER = """
import os, sys, time
from nova_dmigrate.relay.wire import Credentials, FrameType, Role, TlsSettings, connect, frames
port, token, half, *tls = sys.argv[1:]
connection, _ = connect(
    "127.0.0.1", int(port), Credentials("session", bytes.fromhex(token)),
    Role.DATA if half == "half" else Role.ACKS, 0, TlsSettings(*tls) if tls else None, 60,
)
if half == "half":
    header = frames.HEADER.pack(FrameType.VERBATIM, 0, 0, 1 << 20, 0)
    connection._transport.send([header, b"half"], 20)
print("ready", flush=True)
time.sleep(600)
"""


def _name(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


class HandshakeTest(support.WireTestCase):
    def test_both_sides_know_role_index_and_capabilities(self) -> None:
        listener = self.listen(capabilities=frozenset({"a", "b"}))
        source, agreed = self.connect(
            listener, role=Role.ACKS, index=9, capabilities=frozenset({"b", "c"})
        )
        destination, agreed_there = listener.accept(support.LONG)
        self.addCleanup(destination.close)
        self.assertEqual(Agreement(1, frozenset({"b"})), agreed)
        self.assertEqual(agreed, agreed_there)
        for connection in (source, destination):
            self.assertEqual((Role.ACKS, 9), (connection.role, connection.index))
        self.assertEqual(_name(listener.address), source.peer)
        self.assertEqual(_name(source._sock.getsockname()), destination.peer)
        self.assert_carries(destination, source, FrameType.RETURN_PATH)

    def test_several_connections_come_in_at_once(self) -> None:
        listener = self.listen()
        sources = [self.connect(listener, index=index)[0] for index in range(8)]
        accepted = [listener.accept(support.LONG)[0] for _ in range(8)]
        for destination in accepted:
            self.addCleanup(destination.close)
            self.assert_carries(sources[destination.index], destination)
        self.assertEqual(0, listener.refused)

    def test_wrong_token_is_refused_on_both_sides(self) -> None:
        listener = self.listen()
        wrong = Credentials(self.credentials.session_id, os.urandom(32))
        error = self.assertRaises(
            exception.AuthenticationError, self.connect, listener, credentials=wrong
        )
        self.assertIn("it refused this side: the token is wrong", str(error))
        self.assert_refused(listener, 1, "the token is wrong")
        self.assert_right_peer_gets_in(listener)

    def test_wrong_session_is_refused_on_both_sides(self) -> None:
        listener = self.listen()
        wrong = Credentials("another", self.credentials.token)
        error = self.assertRaises(
            exception.AuthenticationError, self.connect, listener, credentials=wrong
        )
        self.assertIn("the session is not known", str(error))
        self.assert_refused(listener, 1, "the session is not known")
        self.assert_right_peer_gets_in(listener)

    def test_wrong_version_is_refused_on_both_sides(self) -> None:
        listener = self.listen()
        original = hello.encode

        def encode(fields: dict[str, object]) -> bytes:
            # Both sides live in this process: only the client's hello speaks of the future.
            return original({**fields, "versions": [7, 8]} if "versions" in fields else fields)

        self.addCleanup(setattr, hello, "encode", original)
        hello.encode = encode
        error = self.assertRaises(exception.VersionMismatch, self.connect, listener)
        hello.encode = original
        self.assertIn("no common protocol version: client 7, 8, server 1", str(error))
        self.assert_refused(listener, 1, "client 7, 8, server 1")
        self.assert_right_peer_gets_in(listener)

    def test_unreachable_relay_is_an_error_that_names_it(self) -> None:
        listener = self.listen()
        listener.close()
        error = self.assertRaises(exception.HandshakeError, self.connect, listener)
        self.assertIn(f"{_name(listener.address)}: cannot connect: Connection refused", str(error))

    def test_silent_relay_is_an_error_after_the_timeout(self) -> None:
        with socket.create_server((support.HOST, 0)) as server:
            error = self.assertRaises(
                exception.HandshakeError, self._connect_to, server.getsockname()[1], support.SHORT
            )
        self.assertIn("the handshake was not done within 0.2 s", str(error))

    def test_something_that_is_no_relay_is_an_error(self) -> None:
        with socket.create_server((support.HOST, 0)) as server:

            def serve() -> None:
                sock, _ = server.accept()
                with sock:
                    sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    support.read_all(sock)

            with support.in_thread(serve):
                error = self.assertRaises(
                    exception.HandshakeError,
                    self._connect_to,
                    server.getsockname()[1],
                    support.LONG,
                )
        expected = "does not speak TLS" if self.use_tls else "does not come from a relay"
        self.assertIn(expected, str(error))

    def _connect_to(self, port: int, timeout: float) -> None:
        class Elsewhere:
            address = (support.HOST, port)

        self.connect(Elsewhere(), timeout=timeout)

    def test_accept_that_waits_in_vain_says_who_was_refused(self) -> None:
        listener = self.listen()
        error = self.assertRaises(exception.HandshakeError, listener.accept, support.SHORT)
        self.assertIn("no relay has connected within 0.2 s", str(error))
        with support.stranger(listener, b"garbage" * 10):
            support.wait_for(lambda: listener.refused > 0)
        error = self.assertRaises(exception.HandshakeError, listener.accept, 0.01)
        self.assertIn("refused: 1, last 127.0.0.1:", str(error))

    def test_close_wakes_accept_and_leaves_nothing(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        listener = self.listen()
        with support.stranger(listener):
            source, _ = self.connect(listener)
            with support.in_thread(lambda: [listener.accept() for _ in range(2)]) as result:
                support.wait_for(lambda: not listener._accepted)
                unaccepted, _ = self.connect(listener, index=1)
                self.assertIsInstance(result(), list)
            for accepted, _ in result():
                accepted.close()
            waiting, _ = self.connect(listener)
            with support.in_thread(listener.close):
                pass
        error = self.assertRaises(exception.HandshakeError, listener.accept, support.LONG)
        self.assertIn("closed", str(error))
        for connection in (source, unaccepted, waiting):
            connection.close()
        support.wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)

    def test_close_wakes_a_waiting_accept(self) -> None:
        listener = self.listen()
        with support.in_thread(listener.accept) as result:
            listener.close()
            self.assertIsInstance(result(), exception.HandshakeError)

    def test_listener_that_cannot_listen_is_a_configuration_error(self) -> None:
        listener = self.listen()
        error = self.assertRaises(
            exception.ConfigurationError, self.listen, port=listener.address[1]
        )
        self.assertIn("Cannot listen at 127.0.0.1:", str(error))

    def test_ipv6_works_as_well(self) -> None:
        if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
            self.skipTest("no IPv6 here")
        listener = self.listen(host="::1")
        self.assert_right_peer_gets_in(listener)

    def _start_peer(self, listener: Listener, mode: str) -> "subprocess.Popen[bytes]":
        tls = self.source_tls
        files = [tls.ca, tls.certificate, tls.key, tls.peer_name] if tls else []
        arguments = [str(listener.address[1]), self.credentials.token.hex(), mode, *files]
        process = subprocess.Popen(
            [sys.executable, "-c", _PEER, *arguments], stdout=subprocess.PIPE
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(b"ready\n", process.stdout.readline())
        return process

    def test_peer_killed_in_mid_frame_is_lost(self) -> None:
        self.credentials = Credentials("session", os.urandom(32))
        listener = self.listen()
        process = self._start_peer(listener, "half")
        receiver, _ = listener.accept(support.LONG)
        self.addCleanup(receiver.close)
        with support.in_thread(lambda: receiver.receive(support.allocate)) as result:
            process.send_signal(signal.SIGKILL)
            self.assertIsInstance(result(), exception.PeerLost)
        self.assertIn("in the middle of a VERBATIM frame", str(result()))

    def test_peer_killed_while_we_send_is_lost(self) -> None:
        self.credentials = Credentials("session", os.urandom(32))
        listener = self.listen()
        process = self._start_peer(listener, "idle")
        sender, _ = listener.accept(support.LONG)
        self.addCleanup(sender.close)

        def flood() -> None:
            while True:
                sender.send(FrameType.RETURN_PATH, payload=[bytes(8 << 20)])

        with support.in_thread(flood) as result:
            process.send_signal(signal.SIGKILL)
            self.assertIsInstance(result(), exception.PeerLost)


class TlsHandshakeTest(HandshakeTest):
    use_tls = True

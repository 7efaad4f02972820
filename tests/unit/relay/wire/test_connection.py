# SPDX-License-Identifier: Apache-2.0
import fcntl
import itertools
import random
import signal
import socket
import struct
import sys
import threading
import time

import hypothesis
import numpy as np
from hypothesis import strategies

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import Connection, Frame, FrameType, Header, Role, frames
from tests.unit.relay.wire import support

_SIOCOUTQNSD = 0x894B  # linux/sockios.h
_FUZZ = hypothesis.settings(deadline=None, derandomize=True, max_examples=60)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((support.HOST, 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


def _receive_until_error(
    data: bytes, cuts: list[int], role: Role = Role.DATA
) -> tuple[list[tuple[Header, bytes]], exception.WireError, int]:
    """Send ``data`` in parts; return the frames received, the error at the end, the memory."""
    raw, sock = _tcp_pair()
    allocated = 0

    def allocate(header: Header) -> memoryview:
        nonlocal allocated
        allocated += header.length
        return memoryview(bytearray(header.length))

    received = []
    with raw, Connection(sock, peer="peer", role=role, index=0, timeout=support.LONG) as receiver:

        def send() -> None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            edges = [0, *sorted(cuts), len(data)]
            for start, end in zip(edges, edges[1:], strict=False):
                raw.sendall(data[start:end])
                time.sleep(0)
            raw.shutdown(socket.SHUT_WR)

        with support.in_thread(send):
            while True:
                try:
                    frame = receiver.receive(allocate)
                except exception.WireError as error:
                    return received, error, allocated
                received.append((frame.header, bytes(frame.payload)))


def _encode(frame: tuple[Header, bytes]) -> bytes:
    return frames.HEADER.pack(*frame[0]) + frame[1]


@strategies.composite
def _valid_frames(draw: strategies.DrawFn) -> tuple[Header, bytes]:
    rule = draw(strategies.sampled_from(list(frames.RULES[Role.DATA].values())))
    units = draw(strategies.integers(1, 20)) if rule.maximum else 0
    length = units * rule.unit
    seed = draw(strategies.integers(0, 255))
    header = Header(rule.type, seed, draw(strategies.integers(0, 65535)), length, seed << 40)
    return header, bytes([seed]) * length


def _unsent_when_full(limit: int | None) -> int:
    """Bytes that the kernel keeps unsent for a sender whose peer reads nothing."""
    raw, sock = _tcp_pair()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with raw, Connection(sock, peer="peer", role=Role.DATA, index=0, timeout=0.3) as sender:
        if limit is not None:
            sender.limit_unsent(limit)
        try:
            while True:
                sender.send(FrameType.VERBATIM, payload=[bytes(64 << 10)])
        except exception.PeerLost:
            answer = fcntl.ioctl(sock, _SIOCOUTQNSD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


class ConnectionTest(support.WireTestCase):
    def test_what_waits_unsent_can_be_limited(self) -> None:
        limited, free = _unsent_when_full(128 << 10), _unsent_when_full(None)
        # It is looked at before each packet of the kernel's, of 64 KiB at most
        self.assertLessEqual(limited, (128 + 64) << 10)
        self.assertGreater(free, 2 * limited)

    def test_frames_arrive_as_they_were_sent(self) -> None:
        sender, receiver = self.pair()
        records = np.zeros(3, frames.REFERENCE)
        records["slot"] = [1, 2, 3]
        payloads = [
            (FrameType.END, []),
            (FrameType.VERBATIM, [b"", b"x", bytearray(b"yz"), b""]),
            (FrameType.REFERENCES, [records[:1], records[1:]]),
            (FrameType.MAP, [np.arange(1000, dtype=np.uint32).reshape(10, 100)]),
            (FrameType.VERBATIM, [bytes([n & 255]) * 20_000 for n in range(50)]),
            (FrameType.VERBATIM, [b"%04d" % n for n in range(5000)]),
        ]
        for number, (frame_type, payload) in enumerate(payloads):
            size = sender.send(frame_type, flags=1, block=number, seq=number, payload=payload)
            joined = b"".join(memoryview(part).tobytes() for part in payload)
            self.assertEqual(16 + len(joined), size)
            frame = receiver.receive(support.allocate)
            self.assertEqual((frame_type, 1, number, len(joined), number), frame.header)
            self.assertEqual(joined, bytes(frame.payload))
        self.assertEqual(sender.bytes_sent, receiver.bytes_received)

    def test_largest_frames_survive_signals_and_partial_sends(self) -> None:
        sender, receiver = self.pair()
        signals = itertools.count()
        interrupted = threading.Event()

        def count_signal(number: int, frame: object) -> None:
            if next(signals) == 20:
                interrupted.set()

        before = signal.signal(signal.SIGUSR1, count_signal)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        generator = np.random.default_rng(5)
        data = generator.integers(0, 256, frames.MAX_PAYLOAD, dtype=np.uint8)
        parts = np.split(data, sorted(random.Random(3).sample(range(len(data)), 3000)))
        sent = threading.Event()

        def interrupt() -> None:
            while not sent.wait(0.0005):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        def receive() -> list[Frame]:
            # By then the sender has filled the sockets' buffers and is stuck in mid-frame.
            interrupted.wait(support.LONG)
            return support.receive_all(receiver, 6)

        with support.in_thread(receive) as result:
            with support.in_thread(interrupt):
                try:
                    for payload in [parts, [data]] * 3:
                        size = sender.send(FrameType.VERBATIM, payload=payload)
                        self.assertEqual(16 + len(data), size)
                finally:
                    sent.set()
            for frame in result():
                self.assertEqual(data.tobytes(), bytes(frame.payload))

    def test_timeout_is_for_progress_and_not_for_the_whole_frame(self) -> None:
        sender, receiver = self.pair()
        sender._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        receiver._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sender.set_timeout(2)
        data = bytes(range(256)) * (frames.MAX_PAYLOAD // 256)

        def receive() -> bytes:
            payload = support.allocate(receiver.receive_header())
            part = len(payload) // 16
            for start in range(0, len(payload), part):
                time.sleep(0.15)
                receiver._transport.receive_into(payload[start : start + part], memoryview(b""))
            return bytes(payload)

        with support.in_thread(receive) as result:
            sender.send(FrameType.VERBATIM, payload=[data])
            self.assertEqual(data, result())

    def test_many_small_frames_keep_their_order(self) -> None:
        sender, receiver = self.pair()
        with support.in_thread(
            lambda: [
                sender.send(FrameType.VERBATIM, seq=n, payload=[b"x" * (n % 50)])
                for n in range(3000)
            ]
        ):
            received = support.receive_all(receiver, 3000)
        self.assertEqual(list(range(3000)), [frame.header.seq for frame in received])
        self.assertEqual([n % 50 for n in range(3000)], [len(frame.payload) for frame in received])

    def test_payload_is_read_into_the_memory_that_was_allocated(self) -> None:
        sender, receiver = self.pair()
        memory = bytearray(1 << 20)
        sender.send(FrameType.VERBATIM, payload=[b"abc"])
        frame = receiver.receive(lambda header: memoryview(memory))
        self.assertEqual(b"abc\0", bytes(memory[:4]))
        self.assertIs(memory, frame.payload.obj)
        self.assertEqual(3, len(frame.payload))

    def test_frames_of_several_threads_are_not_torn(self) -> None:
        sender, receiver = self.pair()

        def send(number: int) -> None:
            for _ in range(20):
                sender.send(FrameType.VERBATIM, block=number, payload=[bytes([number]) * 100_000])

        threads = [threading.Thread(target=send, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for frame in support.receive_all(receiver, 60):
            self.assertEqual(bytes([frame.header.block]) * 100_000, bytes(frame.payload))

    def test_acks_travel_backward(self) -> None:
        sender, receiver = self.pair(Role.ACKS)
        misses = np.array([(7, 1)], frames.MISS)
        sender.send(FrameType.MISSED, payload=[misses])
        frame = receiver.receive(support.allocate)
        self.assertEqual(misses, np.frombuffer(frame.payload, frames.MISS))

    def test_a_frame_that_the_peer_would_refuse_is_not_sent(self) -> None:
        sender, receiver = self.pair()
        large = bytes(frames.MAX_PAYLOAD)
        for frame_type, payload in (
            (FrameType.DONE, [b""]),
            (FrameType.PAGES, [bytes(4103)]),
            (FrameType.VERBATIM, [large, b"x"]),
        ):
            self.assertRaises(exception.FrameError, sender.send, frame_type, payload=payload)
        self.assertEqual(0, sender.bytes_sent)
        self.assert_carries(sender, receiver)

    def test_end_between_frames_is_peer_lost_for_ever(self) -> None:
        sender, receiver = self.pair()
        sender.send(FrameType.VERBATIM, payload=[b"last"])
        sender.close()
        self.assertEqual(b"last", bytes(receiver.receive(support.allocate).payload))
        for _ in range(2):
            error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
            self.assertIn(receiver.peer, str(error))
            self.assertIn("it closed the connection", str(error))
        error = self.assertRaises(exception.PeerLost, sender.send, FrameType.END)
        self.assertIn("closed at this side", str(error))

    def test_silent_peer_is_lost_after_the_timeout(self) -> None:
        _, receiver = self.pair()
        receiver.set_timeout(support.SHORT)
        error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
        self.assertIn("nothing moved for 0.2 s while waiting for a frame", str(error))

    def test_peer_that_stops_in_mid_frame_is_lost_after_the_timeout(self) -> None:
        sender, receiver = self.pair()
        for size in (4104, 1 << 20):
            sender, receiver = self.pair()
            header = frames.HEADER.pack(FrameType.VERBATIM, 0, 0, size, 0)
            sender._transport.send([header, b"only a part"], 27)
            receiver.set_timeout(support.SHORT)
            error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
            self.assertIn("nothing moved for 0.2 s in the middle of a VERBATIM frame", str(error))

    def test_peer_that_takes_nothing_is_lost_after_the_timeout(self) -> None:
        sender, _ = self.pair()
        sender.set_timeout(support.SHORT)
        data = bytes(frames.MAX_PAYLOAD)

        def flood() -> None:
            while True:
                sender.send(FrameType.VERBATIM, payload=[data])

        error = self.assertRaises(exception.PeerLost, flood)
        self.assertIn("nothing moved for 0.2 s while sending a VERBATIM frame", str(error))

    def test_keepalives_keep_a_receiver_content(self) -> None:
        sender, receiver = self.pair()
        sender.send(FrameType.KEEPALIVE)
        frame = receiver.receive(support.allocate)
        self.assertEqual((FrameType.KEEPALIVE, 0), (frame.header.type, len(frame.payload)))

    def test_shutdown_wakes_a_thread_that_receives(self) -> None:
        _, receiver = self.pair()
        for timeout in (None, support.LONG):
            _, receiver = self.pair()
            receiver.set_timeout(timeout)
            with support.in_thread(lambda r=receiver: r.receive(support.allocate)) as result:
                # Most often it blocks by now; if not, it finds the connection shut down.
                time.sleep(0.05)
                receiver.shutdown()
                self.assertIsInstance(result(), exception.PeerLost)
                self.assertIn("shut down at this side", str(result()))

    def test_shutdown_wakes_a_thread_that_receives_a_payload(self) -> None:
        sender, receiver = self.pair()
        sender._transport.send([frames.HEADER.pack(FrameType.VERBATIM, 0, 0, 1 << 20, 0)], 16)
        with support.in_thread(lambda: receiver.receive(support.allocate)) as result:
            time.sleep(0.05)
            receiver.shutdown()
            self.assertIsInstance(result(), exception.PeerLost)

    def test_shutdown_wakes_a_thread_that_sends(self) -> None:
        sender, receiver = self.pair()

        def flood() -> None:
            while True:
                sender.send(FrameType.VERBATIM, payload=[bytes(frames.MAX_PAYLOAD)])

        with support.in_thread(flood) as result:
            receiver.receive(support.allocate)
            time.sleep(0.05)
            sender.shutdown()
            self.assertIsInstance(result(), exception.PeerLost)
            self.assertIn("shut down at this side", str(result()))

    def test_peer_sees_a_shutdown_as_its_loss(self) -> None:
        sender, receiver = self.pair()
        receiver.shutdown()

        def flood() -> None:
            while True:
                sender.send(FrameType.VERBATIM, payload=[bytes(frames.MAX_PAYLOAD)])

        self.assertRaises(exception.PeerLost, flood)
        sender, receiver = self.pair()
        sender.shutdown()
        self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)

    def test_shutdown_and_close_may_come_twice_and_after_the_end(self) -> None:
        sender, receiver = self.pair()
        for connection in (sender, receiver):
            connection.shutdown()
            connection.shutdown()
            connection.close()
            connection.close()
            connection.shutdown()

    def test_reset_is_peer_lost(self) -> None:
        sender, receiver = self.pair()
        sender._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.close()
        error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
        self.assertIn("reset", str(error).lower())

    def test_garbage_is_a_frame_error_for_ever(self) -> None:
        sender, receiver = self.pair()
        sender._transport.send([b"GET / HTTP/1.1\r\n"], 16)
        error = self.assertRaises(exception.FrameError, receiver.receive, support.allocate)
        self.assertIn(f"{sender._sock.getsockname()[1]}: frame type 71 is unknown", str(error))
        error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
        self.assertIn("it sent frame type 71", str(error))

    def test_allocation_that_fails_ends_the_connection_and_is_passed_on(self) -> None:
        def fail(header: Header) -> memoryview:
            raise MemoryError

        for allocate, expected in (
            (fail, MemoryError),
            (lambda header: memoryview(bytearray(header.length - 1)), ValueError),
        ):
            sender, receiver = self.pair()
            sender.send(FrameType.VERBATIM, payload=[b"abc"])
            self.assertRaises(expected, receiver.receive, allocate)
            error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
            self.assertIn("not read to its end", str(error))

    def test_timeouts_below_the_resolution_are_refused(self) -> None:
        sender, _ = self.pair()
        self.assertRaises(ValueError, sender.set_timeout, 0)


class TlsConnectionTest(ConnectionTest):
    use_tls = True

    def test_reset_is_peer_lost(self) -> None:
        sender, receiver = self.pair()
        sender._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.close()
        self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)

    def test_shutdown_never_lets_a_sender_go_on_in_the_clear(self) -> None:
        sender, _ = self.pair()
        sender.shutdown()
        sender._lost = None
        self.assertRaises(exception.PeerLost, sender.send, FrameType.VERBATIM, payload=[b"secret"])
        self.assertEqual("TLSv1.3", sender._sock.version())


class FuzzTest(support.WireTestCase):
    @hypothesis.given(
        sent=strategies.lists(_valid_frames(), max_size=8),
        cuts=strategies.lists(strategies.integers(0, 100_000), max_size=8),
    )
    @_FUZZ
    def test_frames_arrive_however_they_are_cut(
        self, sent: list[tuple[Header, bytes]], cuts: list[int]
    ) -> None:
        data = b"".join(map(_encode, sent))
        received, error, _ = _receive_until_error(data, cuts)
        self.assertEqual(sent, received)
        self.assertIsInstance(error, exception.PeerLost)
        self.assertIn("it closed the connection", str(error))

    @hypothesis.given(
        sent=strategies.lists(_valid_frames(), min_size=1, max_size=8), data=strategies.data()
    )
    @_FUZZ
    def test_truncated_frames_are_peer_lost(
        self, sent: list[tuple[Header, bytes]], data: strategies.DataObject
    ) -> None:
        whole = b"".join(map(_encode, sent))
        end = data.draw(strategies.integers(0, len(whole) - 1))
        received, error, _ = _receive_until_error(whole[:end], [])
        self.assertEqual(sent[: len(received)], received)
        self.assertLess(len(received), len(sent))
        self.assertIsInstance(error, exception.PeerLost)

    @hypothesis.given(
        sent=strategies.lists(_valid_frames(), min_size=1, max_size=8), data=strategies.data()
    )
    @_FUZZ
    def test_damaged_frames_end_in_an_error_of_ours(
        self, sent: list[tuple[Header, bytes]], data: strategies.DataObject
    ) -> None:
        damaged = bytearray(b"".join(map(_encode, sent)))
        for _ in range(data.draw(strategies.integers(1, 4))):
            position = data.draw(strategies.integers(0, len(damaged) - 1))
            damaged[position] = data.draw(strategies.integers(0, 255))
        received, error, allocated = _receive_until_error(bytes(damaged), [])
        self.assertIsInstance(error, exception.PeerLost | exception.FrameError)
        taken = b"".join(map(_encode, received))
        self.assertEqual(bytes(damaged[: len(taken)]), taken)
        self.assertLessEqual(allocated, len(damaged) + frames.MAX_PAYLOAD)

    @hypothesis.given(data=strategies.binary(max_size=200))
    @_FUZZ
    def test_noise_ends_in_an_error_of_ours(self, data: bytes) -> None:
        for role in Role:
            _, error, allocated = _receive_until_error(data, [], role)
            self.assertIsInstance(error, exception.PeerLost | exception.FrameError)
            self.assertLessEqual(allocated, len(data) + frames.MAX_PAYLOAD)

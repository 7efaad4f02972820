# SPDX-License-Identifier: Apache-2.0
"""QEMU's end at the source: its socket, and its stream in buffers."""

import socket
import threading
from collections.abc import Iterator

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.relay.buffers import BufferPool
from nova_dmigrate.relay.intake import Intake, QemuListener
from nova_dmigrate.stream.format import MAX_ELEMENT
from nova_dmigrate.stream.reader import StreamParser
from tests.base import TestCase
from tests.unit.stream.builder import synthetic_stream, varied_stream

LONG = 60.0


class QemuListenerTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "qemu"

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        self.addCleanup(peer.close)
        peer.connect(str(self.path))
        return peer

    def test_a_socket_that_was_left_behind_is_no_obstacle(self) -> None:
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(self.path))
        listener = QemuListener(self.path, "instance")
        self.connect()
        listener.accept().close()
        listener.close()
        self.assertFalse(self.path.exists())

    def test_a_path_that_cannot_be_used_is_an_error(self) -> None:
        missing = self.path / "missing" / "qemu"
        error = self.assertRaises(exception.QemuError, QemuListener, missing, "instance")
        self.assertIn(str(missing), str(error))
        self.assertIn("instance", str(error))

    def test_closing_wakes_who_waits_for_qemu(self) -> None:
        listener = QemuListener(self.path, "instance")
        errors: list[exception.QemuError] = []

        def accept() -> None:
            try:
                listener.accept()
            except exception.QemuError as error:
                errors.append(error)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        listener.close()
        thread.join(LONG)
        self.assertEqual(1, len(errors))
        listener.close()

    def test_a_second_connection_is_noticed(self) -> None:
        listener = QemuListener(self.path, "instance")
        self.connect()
        listener.accept().close()
        self.connect()
        error = self.assertRaises(exception.UnsupportedStream, listener.watch)
        self.assertIn("multifd", str(error))
        listener.close()

    def test_watching_ends_with_the_listener(self) -> None:
        listener = QemuListener(self.path, "instance")
        thread = threading.Thread(target=listener.watch, daemon=True)
        thread.start()
        listener.close()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())


class IntakeTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.near, self.far = socket.socketpair()
        self.addCleanup(self.near.close)
        self.addCleanup(self.far.close)
        self.pool = BufferPool((1 << 16) + MAX_ELEMENT, 4)
        self.parser = StreamParser()
        self.intake = Intake(self.near, self.pool, self.parser, "instance")

    def collect(self) -> Iterator[bytes]:
        for elements, _ in self.intake.batches():
            yield b"".join(element.data for element in elements)

    def send(self, pieces: list[bytes]) -> threading.Thread:
        def send() -> None:
            for piece in pieces:
                self.far.sendall(piece)
            self.far.close()

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        return thread

    def test_what_is_yielded_is_what_was_sent(self) -> None:
        for seed in range(4):
            self.setUp_again()
            stream = varied_stream() if seed % 2 else synthetic_stream("mixed", 700)
            cuts = sorted(np.random.default_rng(seed).integers(0, len(stream), 50).tolist())
            edges = [0, *cuts, len(stream)]
            self.send([stream[a:b] for a, b in zip(edges, edges[1:], strict=False)])
            self.assertEqual(stream, b"".join(self.collect()))
            self.assertEqual(len(stream), self.intake.bytes)

    def setUp_again(self) -> None:
        self.near.close()
        self.near, self.far = socket.socketpair()
        self.addCleanup(self.near.close)
        self.parser = StreamParser()
        self.intake = Intake(self.near, self.pool, self.parser, "instance")

    def test_buffers_are_used_again(self) -> None:
        self.send([synthetic_stream("raw", 4000)])
        total = sum(len(data) for data in self.collect())
        self.assertGreater(total, 4 * self.pool.size)
        self.assertLessEqual(self.pool._made, 2)

    def test_a_buffer_that_is_held_stays_as_it_is(self) -> None:
        stream = synthetic_stream("raw", 64)
        self.send([stream])
        held = []
        for elements, buffer in self.intake.batches():
            if len(held) < 2:
                buffer.hold()
                held.append((elements, b"".join(element.data for element in elements)))
        for elements, data in held:
            self.assertEqual(data, b"".join(element.data for element in elements))

    def test_no_more_is_taken_at_once_than_the_limit(self) -> None:
        self.intake.limit = 1 << 16
        self.send([synthetic_stream("raw", 2000)])
        for elements, _ in self.intake.batches():
            self.assertLessEqual(
                sum(len(element.data) for element in elements), (1 << 16) + 4104 + 100
            )

    def test_what_has_come_is_not_kept_back_for_what_may_come(self) -> None:
        stream = varied_stream()
        self.far.sendall(stream[:5000])
        elements, _ = next(self.intake.batches())
        self.assertTrue(elements)

    def test_a_closed_pool_ends_it(self) -> None:
        self.pool.close()
        self.assertEqual([], list(self.collect()))

    def test_an_end_within_an_element_is_an_end(self) -> None:
        self.far.sendall(varied_stream()[:5000])
        self.far.close()
        list(self.collect())
        self.assertIsNone(self.parser.opaque_reason)

    def test_a_broken_connection_is_an_error(self) -> None:
        self.near.close()
        self.assertRaises(exception.QemuError, list, self.collect())

# SPDX-License-Identifier: Apache-2.0
"""How a migration ends: in order, by request, or because somebody goes away at a bad moment."""

import dataclasses
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.relay.session import RelaySettings
from tests.unit.relay.guest import PAGE, FakeGuest, advised
from tests.unit.relay.pair import HANGS, MIB, Cutter, Pair
from tests.unit.relay.support import PairTestCase

#: A guest whose stream is larger than all buffers on its way.
PAGES = 4096


def drain(qemu: socket.socket) -> bytes:
    pieces = []
    while data := qemu.recv(MIB):
        pieces.append(data)
    return b"".join(pieces)


class EndingTestCase(PairTestCase):
    """Both ends must come to their end, whatever happens."""

    def ending(self, **options: Any) -> Pair:
        guest = FakeGuest(3, ram_pages=PAGES, mapped=0.5, zero=0, dirty=0.02)
        self.pair_ = self.pair(guest, **options)
        return self.pair_

    def assert_states(self, pair: Pair, source: str, destination: str) -> None:
        self.assertEqual(
            (source, destination),
            (pair.source_summary["state"], pair.destination_summary["state"]),
            (pair.source_summary["reason"], pair.destination_summary["reason"]),
        )
        left = [path.name for path in pair.directory.iterdir() if path.is_socket()]
        self.assertEqual(["destination"], left)


class TestQemuCloses(EndingTestCase):
    """One of the QEMUs goes away."""

    def test_the_source_closes_before_it_sends_anything(self) -> None:
        pair = self.ending(sender=lambda qemu: None)
        pair.run()
        self.assert_states(pair, "cancelled", "cancelled")
        self.assertEqual(b"", pair.recorded)

    def test_the_source_closes_in_the_setup(self) -> None:
        pair = self.ending()
        pair.sender = lambda qemu: qemu.sendall(next(iter(pair.chunks))[:50])
        pair.run()
        self.assert_states(pair, "cancelled", "cancelled")

    def test_the_source_closes_in_the_bulk(self) -> None:
        pair = self.ending()
        stream = next(iter(pair.chunks))
        pair.sender = lambda qemu: qemu.sendall(stream[: len(stream) // 2])
        pair.run()
        self.assert_states(pair, "cancelled", "cancelled")
        for summary in (pair.source_summary, pair.destination_summary):
            self.assertIn("before RAM was complete", summary["reason"])
        self.assertIsNone(pair.receiver_error)

    def test_the_destination_closes_in_the_bulk(self) -> None:
        pair = self.ending()
        pair.receiver = lambda qemu: self.assertTrue(qemu.recv(1000))
        pair.run()
        self.assert_states(pair, "failed", "failed")
        self.assertIn("QEMU", pair.destination_summary["reason"])
        self.assertIn("the destination relay gave up", pair.source_summary["reason"])

    def test_the_destination_does_not_listen(self) -> None:
        pair = self.ending()
        pair.prepare()
        (pair.directory / "destination").rename(pair.directory / "elsewhere")
        pair.start()
        pair.join()
        self.assertIn("cannot connect to QEMU", pair.destination_summary["reason"])
        self.assertIn("cannot connect to QEMU", pair.source_summary["reason"])

    def test_a_second_connection_of_qemu_is_refused_with_its_reason(self) -> None:
        pair = self.ending()

        def send(qemu: socket.socket) -> None:
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(pair.directory / "source"))
                drain(qemu)

        pair.sender = send
        pair.run()
        self.assert_states(pair, "failed", "cancelled")
        for summary in (pair.source_summary, pair.destination_summary):
            self.assertIn("multifd", summary["reason"])


class TestCancelling(EndingTestCase):
    """Somebody asks a relay to give up."""

    def cancel_when(
        self, relay: str, receiver: Callable[[socket.socket], None] | None = None
    ) -> Pair:
        """Cancel once the first bytes are through."""
        pair = self.ending()

        def receive(qemu: socket.socket) -> None:
            qemu.recv(1)
            getattr(pair, relay).cancel()
            drain(qemu)

        pair.receiver = receive
        pair.run()
        return pair

    def test_at_the_source(self) -> None:
        pair = self.cancel_when("source")
        self.assert_states(pair, "cancelled", "cancelled")
        self.assertIn("cancelled by request", pair.destination_summary["reason"])

    def test_at_the_destination(self) -> None:
        pair = self.cancel_when("destination")
        self.assert_states(pair, "failed", "cancelled")
        self.assertIn("the destination relay gave up", pair.source_summary["reason"])
        self.assertIn("cancelled by request", pair.source_summary["reason"])

    def test_at_both_at_once(self) -> None:
        pair = self.ending()

        def receive(qemu: socket.socket) -> None:
            qemu.recv(1)
            threads = [
                threading.Thread(target=relay.cancel) for relay in (pair.source, pair.destination)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANGS)
            drain(qemu)

        pair.receiver = receive
        pair.run()
        self.assert_states(pair, "cancelled", "cancelled")

    def test_before_qemu_has_connected(self) -> None:
        for relay in ("source", "destination"):
            with self.subTest(relay=relay):
                pair = self.ending()
                pair.prepare()
                getattr(pair, relay).cancel()
                pair.start()
                pair.join()
                self.assertEqual("cancelled", pair.destination_summary["state"])
                expected = "cancelled" if relay == "source" else "failed"
                self.assertEqual(expected, pair.source_summary["state"])
                self.assertEqual(b"", pair.recorded)

    def test_while_the_destination_dials(self) -> None:
        pair = self.ending()
        pair.prepare()
        dial = pair.destination._outlet.dial

        def cancel_and_dial() -> None:
            pair.destination.cancel()
            dial()

        pair.destination._outlet.dial = cancel_and_dial  # type: ignore[method-assign]
        pair.start()
        pair.join()
        self.assertEqual("cancelled", pair.destination_summary["state"])

    def test_while_the_destinations_qemu_takes_nothing(self) -> None:
        pair = self.ending()
        done = threading.Event()

        def receive(qemu: socket.socket) -> None:
            qemu.recv(1)
            # Long enough for nobody: it does not read before the relays have ended.
            pair.source.cancel()
            done.wait(HANGS)

        pair.receiver = receive
        pair.prepare()
        pair.start()
        pair._threads[0].join(HANGS)
        pair._threads[1].join(HANGS)
        done.set()
        pair.join()
        self.assertEqual("cancelled", pair.source_summary["state"])
        self.assertIn(pair.destination_summary["state"], ("failed", "cancelled"))


class TestPostCopy(EndingTestCase):
    """Where QEMU may have begun post-copy nobody ends a relay: the guest would be lost."""

    def cancelled(self, relay: str, stream: Callable[[bytes], bytes]) -> tuple[Pair, list[bool]]:
        """A migration, cancelled in vain once RAM's setup is through."""
        pair = self.ending()
        (chunk,) = pair.chunks
        pair.chunks = [stream(chunk)]
        told: list[bool] = []

        def receive(qemu: socket.socket) -> None:
            data = qemu.recv(200_000, socket.MSG_WAITALL)
            told.append(getattr(pair, relay).cancel())
            pair.recorded = data + drain(qemu)

        pair.receiver = receive
        pair.run()
        self.assert_delivered(pair)
        return pair, told

    def test_a_relay_is_not_cancelled_once_post_copy_is_advised(self) -> None:
        for relay in ("source", "destination"):
            with self.subTest(relay=relay):
                _, told = self.cancelled(relay, advised)
                self.assertEqual([False], told)
                self.assertIn("is not cancelled", self.log.output)

    def test_a_relay_is_not_cancelled_in_a_stream_that_was_never_understood(self) -> None:
        for relay in ("source", "destination"):
            with self.subTest(relay=relay):
                _, told = self.cancelled(relay, lambda stream: b"?" + stream)
                self.assertEqual([False], told)

    def test_it_is_told_before_it_is_so(self) -> None:
        pair = self.ending()
        (chunk,) = pair.chunks
        pair.chunks = [advised(chunk)]
        pair.prepare()
        told: dict[str, bool] = {}
        for name in ("source", "destination"):
            relay = getattr(pair, name)
            relay._on_kept = lambda name=name, relay=relay: told.update({name: relay._life.kept})
        pair.start()
        pair.join()
        self.assert_delivered(pair)
        self.assertEqual({"source": False, "destination": False}, told)

    def test_without_it_nothing_is_told(self) -> None:
        pair = self.ending()
        pair.prepare()
        for name in ("source", "destination"):
            getattr(pair, name)._on_kept = self.fail
        pair.start()
        pair.join()
        self.assert_delivered(pair)


class TestIdle(EndingTestCase):
    """A QEMU that never comes."""

    def idle(self, **settings: RelaySettings) -> Pair:
        pair = self.ending(**settings)
        pair.prepare()
        threads = [
            threading.Thread(target=target, daemon=True)
            for target in (pair._run_source, pair._run_destination)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
        pair.recorder.close()
        self.assert_states(pair, "failed", pair.destination_summary["state"])
        return pair

    def test_the_source_ends_by_itself_and_the_destination_with_it(self) -> None:
        pair = self.idle(source_settings=RelaySettings(idle_timeout=0.1))
        self.assertIn("QEMU has not begun within 0.1 s", pair.source_summary["reason"])
        self.assertEqual("cancelled", pair.destination_summary["state"])

    def test_the_destination_ends_by_itself_and_the_source_with_it(self) -> None:
        pair = self.idle(destination_settings=RelaySettings(idle_timeout=0.1))
        self.assertIn("QEMU has not begun within 0.1 s", pair.destination_summary["reason"])

    def test_a_destination_without_a_source_ends_by_itself(self) -> None:
        pair = self.ending(
            source_token=bytes(32), destination_settings=RelaySettings(idle_timeout=0.1)
        )
        self.assertRaises(exception.AuthenticationError, pair.prepare)
        pair._run_destination()
        pair.recorder.close()
        self.assertIn("QEMU has not begun", pair.destination_summary["reason"])

    def test_who_has_begun_has_all_the_time(self) -> None:
        settings = RelaySettings(idle_timeout=3)
        guest = FakeGuest(3, ram_pages=PAGES)
        pair = self.pair(guest, source_settings=settings, destination_settings=settings)
        (stream,) = pair.chunks

        def send(qemu: socket.socket) -> None:
            qemu.sendall(stream[: len(stream) // 2])
            threading.Event().wait(3.5)
            qemu.sendall(stream[len(stream) // 2 :])

        pair.sender = send
        pair.run()
        self.assert_exact(guest, pair)


class TestAnywhere(EndingTestCase):
    """The same at random places of the stream, and before them as well as behind them."""

    def sweep(self, name: str) -> None:
        for seed in range(12):
            with self.subTest(seed=seed):
                random = np.random.default_rng(seed)
                guest = FakeGuest(
                    seed, ram_pages=640, mapped=1.0, stale=float(random.choice([0, 1.0]))
                )
                settings = RelaySettings(
                    volume_read_size=1 << 14, hold_pages=0, read_ahead=1 << 16,
                    window_size=int(random.choice([1 << 16, 1 << 24])),
                    channels=int(random.integers(1, 4)),
                )  # fmt: skip
                pair = self.pair(guest, source_settings=settings, destination_settings=settings)
                stream = next(iter(pair.chunks))
                place = int(random.integers(1, len(stream) * 9 // 10))
                self.begin(pair, name, stream, place)
                pair.run()
                states = (pair.source_summary["state"], pair.destination_summary["state"])
                self.assertNotIn("delivered", states)

    def begin(self, pair: Pair, name: str, stream: bytes, place: int) -> None:
        def send(qemu: socket.socket) -> None:
            qemu.sendall(stream[:place])
            if name in ("source", "destination"):
                getattr(pair, name).cancel()
                drain(qemu)

        def receive(qemu: socket.socket) -> None:
            qemu.recv(place % 50_000 + 1, socket.MSG_WAITALL)

        if name == "recorder":
            pair.receiver = receive
        else:
            pair.sender = send

    def test_the_source_relay_is_cancelled(self) -> None:
        self.sweep("source")

    def test_the_destination_relay_is_cancelled(self) -> None:
        self.sweep("destination")

    def test_the_source_closes(self) -> None:
        self.sweep("sender")

    def test_the_destination_closes(self) -> None:
        self.sweep("recorder")


class TestWire(EndingTestCase):
    """The network between the relays fails."""

    def cut(self, connection: int, limit: int) -> Pair:
        cutters: list[Cutter] = []

        def route(address: tuple[str, int]) -> tuple[str, int]:
            cutters.append(Cutter(address, connection=connection, limit=limit))
            return cutters[0].address

        # With one connection for the data, so that as much as that is certain to go through it.
        pair = self.ending(route=route, source_settings=RelaySettings(channels=1))
        try:
            pair.run()
        finally:
            cutters[0].close()
        self.assert_states(pair, "failed", "failed")
        return pair

    def test_a_connection_that_breaks_at_any_byte_ends_both(self) -> None:
        limits = np.random.default_rng(7).integers(2000, 3 << 20, 6)
        for limit in [2000, 70_000, *limits.tolist()]:
            with self.subTest(limit=limit):
                self.cut(1, limit)

    def test_the_answers_connection_breaks(self) -> None:
        # Behind the handshake: some answers are through.
        pair = self.cut(0, 1500)
        self.assertIn("Peer", pair.source_summary["reason"])

    def test_a_wrong_token_is_refused_and_costs_nothing_else(self) -> None:
        pair = self.ending(source_token=bytes(32))
        self.assertRaises(exception.AuthenticationError, pair.prepare)
        pair.abandon()
        self.assertEqual(1, pair.destination_summary["refused_connections"])
        self.assertEqual("cancelled", pair.destination_summary["state"])
        self.assertFalse((pair.directory / "source").exists())

    def test_strangers_do_not_disturb_a_migration(self) -> None:
        guest = FakeGuest(4, ram_pages=512)
        strangers = []

        def route(address: tuple[str, int]) -> tuple[str, int]:
            for _ in range(5):
                strangers.append(socket.create_connection(address))
                strangers[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
                strangers.append(socket.create_connection(address))
            return address

        pair = self.migrate(guest, route=route)
        for stranger in strangers:
            stranger.close()
        self.assertGreaterEqual(pair.destination_summary["refused_connections"], 5)


class TestReturnPath(EndingTestCase):
    """What goes the other way, and the order in which the two directions end."""

    def setUp(self) -> None:
        super().setUp()
        self.stream = next(iter(self.ending().chunks))
        self.cut = len(self.stream) // 3
        self.late = b"late" * 100_000
        self.received = self.returned = b""

    def test_the_source_may_close_its_direction_first(self) -> None:
        def send(qemu: socket.socket) -> None:
            qemu.sendall(self.stream[: self.cut])
            # In the middle of the stream a message comes back.
            self.assertEqual(b"early", qemu.recv(5, socket.MSG_WAITALL))
            qemu.sendall(self.stream[self.cut :])
            qemu.shutdown(socket.SHUT_WR)
            self.returned = drain(qemu)

        def receive(qemu: socket.socket) -> None:
            first = qemu.recv(MIB)
            qemu.sendall(b"early")
            self.received = first + drain(qemu)
            qemu.sendall(self.late)

        self.relay(send, receive)

    def test_the_destination_may_close_its_direction_first(self) -> None:
        def send(qemu: socket.socket) -> None:
            qemu.sendall(self.stream[:-10])
            self.returned = drain(qemu)
            qemu.sendall(self.stream[-10:])

        def receive(qemu: socket.socket) -> None:
            while not self.received.endswith(self.stream[-20:-10]):
                self.received += qemu.recv(MIB)
            qemu.sendall(self.late)
            qemu.shutdown(socket.SHUT_WR)
            self.received += drain(qemu)

        self.relay(send, receive)

    def relay(
        self, send: Callable[[socket.socket], None], receive: Callable[[socket.socket], None]
    ) -> None:
        pair = self.ending(sender=send, receiver=receive)
        pair.run()
        self.assert_delivered(pair)
        self.assertEqual(self.late, self.returned)
        self.assertEqual(self.stream[-500:], self.received[-500:])

    def test_what_qemu_says_reaches_the_other_qemu(self) -> None:
        guest = FakeGuest(6, ram_pages=512)
        pair = self.migrate(guest, answer=bytes(range(256)) * 10)
        self.assertEqual(pair.answer, pair.answered)

    def test_a_qemu_that_keeps_its_socket_open_is_not_waited_for_for_ever(self) -> None:
        done = threading.Event()

        def receive(qemu: socket.socket) -> None:
            drain(qemu)
            done.wait(HANGS)

        pair = self.ending(receiver=receive)
        pair.prepare()
        complete = pair.destination._complete

        def complete_soon() -> None:
            settings = pair.destination._settings
            pair.destination._settings = dataclasses.replace(settings, stall_timeout=0.05)
            complete()

        pair.destination._complete = complete_soon  # type: ignore[method-assign]
        pair.start()
        for thread in pair._threads[:2]:
            thread.join(HANGS)
        done.set()
        pair.join()
        self.assert_delivered(pair)


class TestSummary(EndingTestCase):
    """What is left of a migration: its summary."""

    def test_a_summary_that_cannot_be_written_does_not_change_the_end(self) -> None:
        guest = FakeGuest(8, ram_pages=512)
        pair = self.pair(guest)
        pair.prepare()
        (pair.directory / "source.json.partial").mkdir()
        pair.start()
        pair.join()
        self.assert_exact(guest, pair)
        self.assertIn("The summary cannot be written", self.log.output)
        self.assertFalse((pair.directory / "source.json").exists())
        self.assertTrue((pair.directory / "destination.json").exists())

    def test_a_socket_that_cannot_be_made_is_an_error_and_leaves_nothing(self) -> None:
        pair = self.ending()
        (pair.directory / "source").mkdir()
        self.assertRaises(exception.QemuError, pair.prepare)
        pair.abandon()

    def test_figures_agree(self) -> None:
        guest = FakeGuest(9, ram_pages=1024, mapped=0.9, stale=0.3, dirty=0.2)
        pair = self.migrate(guest)
        source, destination = pair.source_summary, pair.destination_summary
        self.assertEqual(len(next(iter(pair.chunks))), source["guest_bytes"])
        self.assertEqual(source["wire_bytes"], destination["wire_bytes"])
        self.assertEqual(len(pair.recorded), destination["qemu_bytes"])
        self.assertEqual(0, source["unresolved_pages"])
        self.assertEqual(0, destination["unresolved_pages"])
        self.assertEqual(destination["hits"], source["destination"]["hits"])
        self.assertEqual(PAGE * len(guest.pages) // PAGE, destination["mapped_pages"])
        resolved = destination["hits"] + sum(source["misses"].values())
        self.assertLessEqual(resolved, source["referenced_pages"])

# SPDX-License-Identifier: Apache-2.0
"""The lab itself: if these fail, no other integration test means anything."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.lab import (
    Guest,
    GuestSpec,
    HeartbeatRecorder,
    HostPair,
    StreamTap,
    compare_ram,
    create_disk,
    differing_pages,
    end,
    spawn,
    stream_mismatches,
    workspace,
)
from tests.lab.processes import start_time

ROOT = Path(__file__).parents[2]

# Connects and sends for three seconds, prints the bytes a second that the peer has taken.
SEND = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 7000), 10)
data, sent, start = bytes(65536), 0, time.monotonic()
while time.monotonic() - start < 3: sent += s.send(data)
s.shutdown(socket.SHUT_WR); s.recv(1)
print(sent / (time.monotonic() - start))
"""
RECEIVE = """
import socket, sys
s = socket.create_server((sys.argv[1], 7000)); print("ready", flush=True)
c = s.accept()[0]; c.settimeout(float(sys.argv[2]))
try:
    while c.recv(1 << 20): pass
    print("end")
except TimeoutError: print("silence")
"""
# A test process that is killed while a guest and two hosts exist.
DOOMED = """
import sys, time
from tests.lab import Guest, GuestSpec, HostPair, create_disk, workspace
with workspace() as directory, HostPair() as (a, b):
    spec = GuestSpec(create_disk(directory / "disk.raw", 16), ram_mb=256, fill_mb=16)
    with Guest.start_destination(spec, host=a) as guest:
        print(guest.pid, a.namespace, directory, guest.directory, flush=True)
        time.sleep(600)
"""


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class TestGuest(unittest.TestCase):
    """One booted guest serves all of these migrations."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.directory = Path(cls.enterClassContext(workspace()))
        cls.disk = create_disk(cls.directory / "disk.raw", 128)
        cls.spec = GuestSpec(cls.disk, ram_mb=384, fill_mb=128, mapped=80, zero=10)
        cls.source = cls.enterClassContext(Guest.start_source(cls.spec))

    @classmethod
    def enterClassContext(cls, manager: Any) -> Any:  # unittest has it from 3.11 on
        value = manager.__enter__()
        cls.addClassCleanup(manager.__exit__, None, None, None)
        return value

    def setUp(self) -> None:
        self.source.fill()

    def migrate_directly(self, destination: Guest, uri: str | Path) -> dict[str, Any]:
        for guest in (self.source, destination):
            guest.set_capabilities("return-path")
        self.source.migrate(destination.listen(uri))
        state = self.source.wait_migration()
        self.assertEqual("completed", state["status"], state)
        self.assertEqual("paused", destination.wait_incoming())
        return state

    def assert_map_is_right(self, gpa: Any, offset: Any) -> Any:
        disk = np.memmap(self.disk, np.uint8, "r").reshape(-1, 4096)
        expected = disk[(offset // 4096).astype(np.int64)]
        np.testing.assert_array_equal(expected, self.source.ram[self.source.page_of(gpa)])
        return expected

    def test_the_buffer_map_tells_which_bytes_of_the_disk_each_guest_page_holds(self) -> None:
        gpa, offset = self.source.buffer_map_extents()
        self.assertEqual(128 * 64 * 80 // 100 * 4, gpa.size)
        self.assertEqual(gpa.size, np.unique(gpa).size)
        expected = self.assert_map_is_right(gpa, offset)
        saved = self.source.pmemsave(self.directory / "one.page", int(gpa[0]), 4096)
        self.assertEqual(expected[0].tobytes(), saved.read_bytes())

    def test_memory_order_is_not_disk_order(self) -> None:
        gpa, offset = self.source.buffer_map_extents()
        frames = offset[np.argsort(gpa)] // 16384
        self.assertLess(np.mean(np.abs(np.diff(frames.astype(np.int64))) <= 1), 0.9)

    def test_a_refill_with_another_seed_is_another_memory_with_a_right_map(self) -> None:
        before = self.source.command("sum")
        self.source.fill(mapped=30, seed=8)
        gpa, offset = self.source.buffer_map_extents(refresh=False)
        self.assertEqual(128 * 64 * 30 // 100 * 4, gpa.size)
        self.assert_map_is_right(gpa, offset)
        self.assertNotEqual(before, self.source.command("sum"))
        self.source.fill()
        self.assertEqual(before, self.source.command("sum"))

    def test_dirtying_changes_pages_until_it_is_stopped(self) -> None:
        before = self.source.command("sum")
        self.assertEqual(before, self.source.command("sum"))
        self.source.command("dirty 10 20 full")
        self.assertTrue(eventually(lambda: before != self.source.command("sum")))
        self.source.command("dirty 0 0")
        after = self.source.command("sum")
        self.assertNotEqual(before, after)
        self.assertEqual(after, self.source.command("sum"))

    def test_writing_the_same_content_again_changes_nothing(self) -> None:
        before = self.source.command("sum")
        self.source.command("dirty 50 20 same")
        time.sleep(0.3)
        self.source.command("dirty 0 0")
        self.assertEqual(before, self.source.command("sum"))

    def test_direct_migrations_of_one_source_in_a_row_are_bit_exact(self) -> None:
        for attempt in range(5):
            with self.subTest(attempt), Guest.start_destination(self.spec) as destination:
                self.source.command(f"dirty 20 {5 * attempt} full")
                uri: str | Path = destination.directory / "in.sock"
                if attempt % 2:
                    with socket.create_server(("127.0.0.1", 0)) as free:
                        uri = f"tcp:127.0.0.1:{free.getsockname()[1]}"
                self.migrate_directly(destination, uri)
                self.assertEqual("postmigrate", self.source.status)
                self.assertEqual([], differing_pages(self.source, destination).tolist())
                self.source.cont()
                self.assertEqual("pong", self.source.command("ping"))

    def test_the_memory_of_an_idle_guest_arrives_bit_exact_too(self) -> None:
        # where QEMU loses pages of a RAMBlock of whole 256 KiB: few, written again and again
        self.source.command("beat on")
        self.addCleanup(self.source.command, "beat off")
        self.source.set_parameters(downtime_limit=20)
        self.addCleanup(self.source.set_parameters, downtime_limit=300)
        for attempt in range(3):
            with self.subTest(attempt), Guest.start_destination(self.spec) as destination:
                self.migrate_directly(destination, destination.directory / "in.sock")
                self.assertEqual([], differing_pages(self.source, destination).tolist())
                self.source.cont()

    def test_a_running_guest_arrives_as_its_qemu_sent_it(self) -> None:
        self.source.command("dirty 20 10 full")
        with Guest.start_destination(self.spec) as destination:
            target = destination.directory / "in.sock"
            destination.listen(target)
            with StreamTap(destination.directory, target) as tap:
                self.source.migrate(tap.path)
                self.assertEqual("completed", self.source.wait_migration()["status"])
                destination.wait_incoming()
                mismatches = stream_mismatches(destination, tap.finish())
                self.assertEqual([], mismatches.tolist())
                # and the oracle sees a single wrong byte
                wrong = np.array(destination.ram)
                wrong[4711, 815] ^= 1
                self.assertEqual([4711], compare_ram(wrong, destination.ram).tolist())
        self.source.cont()

    def test_the_destination_goes_on_with_the_same_memory(self) -> None:
        before = self.source.command("sum")
        with Guest.start_destination(self.spec) as destination:
            self.migrate_directly(destination, destination.directory / "in.sock")
            destination.cont()
            self.assertEqual(before, destination.command("sum"))
        self.source.cont()
        self.assertEqual(before, self.source.command("sum"))

    def test_heartbeats_from_both_sides_show_the_downtime(self) -> None:
        with Guest.start_destination(self.spec) as destination:
            with HeartbeatRecorder(self.source, destination) as recorder:
                self.source.command("beat on")
                self.assertTrue(eventually(lambda: recorder.times().size > 200))
                self.migrate_directly(destination, destination.directory / "in.sock")
                time.sleep(0.2)  # a downtime of our own: the destination starts paused
                destination.cont()
                self.assertTrue(eventually(lambda: recorder.times(1).size > 200))
                destination.command("beat off")
            self.assertGreater(recorder.handover_gap(), 0.2)
            self.assertGreaterEqual(recorder.largest_gap(), recorder.handover_gap())
        self.source.cont()
        self.source.command("beat off")

    def test_a_destination_whose_stream_breaks_ends_and_the_source_goes_on(self) -> None:
        with Guest.start_destination(self.spec) as destination:
            self.source.set_parameters(max_bandwidth=1 << 20)
            self.addCleanup(self.source.set_parameters, max_bandwidth=1 << 34)
            self.source.migrate(destination.listen(destination.directory / "in.sock"))
            time.sleep(0.2)
            destination.kill()
            self.assertEqual("failed", self.source.wait_migration()["status"])
            self.assertEqual("running", self.source.status)


class TestHosts(unittest.TestCase):
    def receiver(self, host: Any, patience: float) -> "subprocess.Popen[Any]":
        argv = [sys.executable, "-c", RECEIVE, host.address, str(patience)]
        process = host.popen(argv, stdout=subprocess.PIPE, text=True)
        self.addCleanup(end, process)
        self.assertEqual("ready\n", process.stdout.readline())
        return process

    def sender(self, host: Any, address: str) -> "subprocess.Popen[Any]":
        argv = [sys.executable, "-c", SEND, address]
        process = host.popen(argv, stdout=subprocess.PIPE, text=True)
        self.addCleanup(end, process)
        return process

    def wait_for_traffic(self, host: Any) -> None:
        """Until a sender that was started there sends: it is not connected at once."""
        number = (host.pair.a, host.pair.b).index(host)
        before = host.pair.counters()[number]
        self.assertTrue(eventually(lambda: host.pair.counters()[number] > before + (1 << 20)))

    def test_a_shaped_link_carries_what_it_was_told_to(self) -> None:
        with HostPair() as (a, b):
            for rate in (5e6, 40e6):
                with self.subTest(rate):
                    a.pair.shape(rate)
                    receiver = self.receiver(b, 30)
                    sent = a.pair.counters()[0]
                    sender = self.sender(a, b.address)
                    measured = float(sender.communicate(timeout=60)[0])
                    end(receiver)
                    self.assertGreater(a.pair.counters()[0] - sent, measured * 3)
                    self.assertLess(measured, rate * 1.1)  # never more; less on a busy machine

    def test_a_stalled_link_carries_nothing_until_it_is_restored(self) -> None:
        with HostPair() as (a, b):
            a.pair.shape(5e6)
            receiver, sender = self.receiver(b, 60), self.sender(a, b.address)
            self.wait_for_traffic(a)
            a.pair.stall()
            time.sleep(1)  # what is in the queue still arrives
            before = b.run(["cat", "/proc/net/snmp"]).stdout
            time.sleep(1)
            self.assertEqual(before, b.run(["cat", "/proc/net/snmp"]).stdout)
            a.pair.restore()
            self.assertGreater(float(sender.communicate(timeout=60)[0]), 0)
            self.assertEqual("end\n", receiver.communicate(timeout=60)[0])

    def test_a_cut_link_is_silence_for_both_sides(self) -> None:
        with HostPair() as (a, b):
            a.pair.shape(5e6)
            receiver, sender = self.receiver(b, 1), self.sender(a, b.address)
            self.wait_for_traffic(a)
            a.pair.cut()
            self.assertEqual("silence\n", receiver.communicate(timeout=60)[0])
            end(sender)
            a.pair.restore()
            self.assertEqual(0, b.run(["true"]).returncode)

    def test_two_pairs_do_not_see_each_other(self) -> None:
        with HostPair() as (a, b), HostPair() as (c, _):
            self.assertEqual(a.address, c.address)
            receiver = self.receiver(b, 1)
            with self.assertRaises(subprocess.CalledProcessError):
                c.run([sys.executable, "-c", SEND, b.address], timeout=30)
            end(receiver)

    def test_a_guest_on_a_host_migrates_over_the_link(self) -> None:
        with workspace() as directory, HostPair() as (a, b):
            disk = create_disk(directory / "disk.raw", 16)
            spec = GuestSpec(disk, ram_mb=256, fill_mb=16, shared=False)
            with (
                Guest.start_source(spec, host=a) as source,
                Guest.start_destination(spec, host=b) as destination,
            ):
                source.migrate(destination.listen(f"tcp:{b.address}:4444"))
                self.assertEqual("completed", source.wait_migration()["status"])
                destination.wait_incoming()
                self.assertEqual([], differing_pages(source, destination).tolist())


class TestCleanUp(unittest.TestCase):
    def test_a_closed_guest_leaves_neither_process_nor_file(self) -> None:
        with workspace() as directory:
            spec = GuestSpec(create_disk(directory / "disk.raw", 16), ram_mb=256, fill_mb=16)
            with Guest.start_destination(spec) as guest:
                pid = guest.pid
            self.assertIsNone(start_time(pid))
            self.assertFalse(guest.directory.exists())

    def test_a_qemu_that_cannot_start_says_why_and_leaves_nothing(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            spec = GuestSpec(directory / "missing.raw", ram_mb=256, fill_mb=16)
            with self.assertRaisesRegex(Exception, "missing.raw"):
                Guest.start_destination(spec, directory=directory)
            self.assertEqual([], list(directory.iterdir()))

    def test_a_killed_test_process_leaves_nothing_behind(self) -> None:
        doomed = spawn([sys.executable, "-c", DOOMED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.addCleanup(end, doomed)
        assert doomed.stdout is not None
        pid, namespace, *directories = doomed.stdout.readline().split()
        self.assertIsNotNone(start_time(int(pid)))
        paths = [Path("/run/netns") / namespace, *map(Path, directories)]
        self.assertTrue(all(path.exists() for path in paths))
        doomed.send_signal(signal.SIGKILL)
        self.assertTrue(eventually(lambda: start_time(int(pid)) is None))
        self.assertTrue(eventually(lambda: not any(path.exists() for path in paths)))

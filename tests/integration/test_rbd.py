# SPDX-License-Identifier: Apache-2.0
"""RBD images of a real Ceph: what the reader reads, and what it makes of a Ceph that fails."""

import contextlib
import random
import subprocess
import threading
import time
from typing import Any, ClassVar

from nova_dmigrate import exception, volumes
from tests import base
from tests.lab import ceph, processes
from tests.lab.ceph import Ceph
from tests.lab.relays import wait_until
from tests.lab.volume_reads import try_blocks, try_reads

BLOCK = 4096
OBJECT = 4 << 20
POOL, IMAGE = "volumes", "volume-1"
#: Two whole objects, of which the second is a hole, and one that ends within a block.
SIZE = 2 * OBJECT + 300 * BLOCK + 100
#: Of the reader; a busy machine takes its time, and nothing here depends on how long.
TIMEOUT = 10.0
#: Seconds of the reader where it shall not wait.
SHORT = 3.0


def content(size: int = SIZE) -> bytes:
    data = bytearray(random.Random(5).randbytes(size))
    data[OBJECT : 2 * OBJECT] = bytes(len(data[OBJECT : 2 * OBJECT]))
    return bytes(data)


class RbdTest(base.TestCase):
    """All share a Ceph with a pool of volumes, a client that may only read, and a guest's."""

    ceph: ClassVar[Ceph]
    _class: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(ceph.missing())
        cls._class = contextlib.ExitStack()
        cls.ceph = cls._class.enter_context(Ceph())
        try:
            cls.ceph.create_pool(POOL)
            cls.ceph.add_client("reader", osd=f"profile rbd-read-only pool={POOL}")
            cls.ceph.add_client("guest", osd=f"profile rbd pool={POOL}")
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls._class.close()
        super().tearDownClass()

    def image(self, data: bytes, name: str = IMAGE, namespace: str = "") -> None:
        """An image with this content, for the test; parts of zeros are never written."""
        self.ceph.create_image(POOL, name, len(data), namespace)
        self.addCleanup(self.ceph.remove_image, POOL, name, namespace)
        for offset in range(0, len(data), OBJECT):
            part = data[offset : offset + OBJECT]
            if any(part):
                self.ceph.write(POOL, name, offset, part, namespace)

    def location(self, image: str = IMAGE, user: str = "reader") -> str:
        return f"{POOL}/{image}?id={user}&conf={self.ceph.configuration}"

    def open(self, location: str | None = None, timeout: float = TIMEOUT,
             secret: str = "") -> volumes.RbdReader:  # fmt: skip
        spec = volumes.VolumeSpec("vol", "rbd", location or self.location(), secret)
        reader = volumes.RbdReader(spec, volumes.VolumeAccess(timeout=timeout))
        self.addCleanup(reader.close)
        return reader

    def assert_reads(self, data: bytes, reader: volumes.VolumeReader) -> None:
        """The reader reads all whole blocks as they are."""
        self.assertEqual(len(data), reader.size)
        whole = len(data) // BLOCK * BLOCK
        buffer = volumes.aligned_buffer(whole)
        buffer[:] = b"\xaa" * whole
        for start in range(0, whole, 3 << 20):  # across objects
            reader.read_into(start, buffer[start : start + (3 << 20)])
        self.assertTrue(data[:whole] == buffer)

    # What is read

    def test_an_image_is_read_to_its_last_whole_block_with_its_holes(self) -> None:
        data = content()
        self.image(data)
        reader = self.open()
        self.assert_reads(data, reader)
        buffer = volumes.aligned_buffer(2 * BLOCK)
        end = len(data) // BLOCK * BLOCK
        reader.read_into(end - BLOCK, buffer[:BLOCK])
        self.assertEqual(data[end - BLOCK : end], bytes(buffer[:BLOCK]))
        for offset, part in ((end, buffer[:BLOCK]), (end - BLOCK, buffer), (512, buffer)):
            self.assertRaises(exception.VolumeBoundsError, reader.read_into, offset, part)

    def test_many_ranges_are_each_read_or_refused_by_themselves(self) -> None:
        data = content()
        self.image(data)
        numbers = random.Random(1).choices(range(-1, SIZE // BLOCK + 2), k=200)
        buffers = [memoryview(bytearray(BLOCK + 1))[1:] for _ in numbers]
        results = try_reads(
            self.open(),
            [(number * BLOCK, part) for number, part in zip(numbers, buffers, strict=True)],
        )
        self.assertEqual(len(numbers), len(results))
        for number, part, error in zip(numbers, buffers, results, strict=True):
            if 0 <= number < SIZE // BLOCK:
                self.assertIsNone(error)
                self.assertEqual(data[number * BLOCK : (number + 1) * BLOCK], bytes(part))
            else:
                self.assertIsInstance(error, exception.VolumeBoundsError)

    def test_many_threads_can_read_at_once(self) -> None:
        data = content()
        self.image(data)
        reader = self.open()
        wrong = []

        def read(seed: int) -> None:
            chosen = random.Random(seed)
            buffer = volumes.aligned_buffer(16 * BLOCK)
            for _ in range(20):
                offset = chosen.randrange(SIZE // BLOCK - 16) * BLOCK
                reader.read_into(offset, buffer)
                if bytes(buffer) != data[offset : offset + len(buffer)]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)

    def test_what_another_client_wrote_meanwhile_is_seen_in_holes_too(self) -> None:
        data = bytearray(content())
        self.image(bytes(data))
        reader = self.open()
        self.assert_reads(bytes(data), reader)
        for offset in (0, OBJECT - BLOCK, OBJECT + 5 * BLOCK):
            data[offset : offset + 2 * BLOCK] = random.randbytes(2 * BLOCK)
            self.ceph.write(POOL, IMAGE, offset, bytes(data[offset : offset + 2 * BLOCK]))
        self.assert_reads(bytes(data), reader)

    def test_namespaces_snapshots_and_clones_are_read(self) -> None:
        data = content(OBJECT + BLOCK)
        self.ceph.create_namespace(POOL, "tenant")
        self.image(data, namespace="tenant")
        self.assert_reads(data, self.open(self.location(f"tenant/{IMAGE}")))

        self.image(data)
        self.ceph.rbd("snap", "create", f"{POOL}/{IMAGE}@before")
        self.addCleanup(self.ceph.rbd, "snap", "purge", f"{POOL}/{IMAGE}")
        self.ceph.write(POOL, IMAGE, 0, bytes(BLOCK))
        self.assert_reads(data, self.open(self.location(f"{IMAGE}@before")))
        self.assert_reads(bytes(BLOCK) + data[BLOCK:], self.open())

        self.ceph.rbd("snap", "protect", f"{POOL}/{IMAGE}@before")
        self.addCleanup(self.ceph.rbd, "snap", "unprotect", f"{POOL}/{IMAGE}@before")
        self.ceph.rbd("clone", f"{POOL}/{IMAGE}@before", f"{POOL}/clone")
        self.addCleanup(self.ceph.remove_image, POOL, "clone")
        self.ceph.write(POOL, "clone", BLOCK, bytes(BLOCK))
        self.assert_reads(
            data[:BLOCK] + bytes(BLOCK) + data[2 * BLOCK :], self.open(self.location("clone"))
        )

    def test_without_a_configuration_monitors_and_a_keyring_or_a_key_will_do(self) -> None:
        data = content(BLOCK)
        self.image(data)
        keyring = self.ceph.keyring("reader")
        place = f"{POOL}/{IMAGE}?id=reader&cluster=none&mon_host={self.ceph.monitor}"
        self.assert_reads(data, self.open(f"{place}&keyring={keyring}"))
        key = keyring.read_text().partition("key = ")[2].split()[0]
        self.assert_reads(data, self.open(place, secret=key))

    def test_the_hosts_own_account_counts_more_than_that_of_the_location(self) -> None:
        data = content(BLOCK)
        self.image(data)
        own = volumes.VolumeAccess(
            timeout=TIMEOUT,
            rbd_user="reader",
            rbd_configuration=str(self.ceph.configuration),
            rbd_keyring=str(self.ceph.keyring("reader")),
        )
        spec = volumes.VolumeSpec("vol", "rbd", f"{POOL}/{IMAGE}?id=nobody&mon_host=192.0.2.1")
        with volumes.open_volume(spec, own) as reader:
            self.assert_reads(data, reader)

    def test_what_cannot_be_opened_is_named(self) -> None:
        self.image(content(BLOCK))
        conf = f"conf={self.ceph.configuration}"
        for location, secret, sentence in (
            (f"{POOL}/{IMAGE}?id=nobody&{conf}", "", "refuse client.nobody, whose keyring is"),
            (
                f"{POOL}/{IMAGE}?id=reader&{conf}",
                "AQBSdFhcAAAAABAAKXcCaTrXxUnX0Zr6Ln6gBQ==",
                "refuse client.reader, whose keyring is missing or wrong",
            ),
            (f"images/{IMAGE}?id=reader&{conf}", "", "pool images cannot be opened by client.read"),
            (f"{POOL}/other?id=reader&{conf}", "", f"RBD image {POOL}/other cannot be opened"),
            (f"{POOL}/{IMAGE}@s?id=reader&{conf}", "", f"RBD image {POOL}/{IMAGE}@s cannot be"),
        ):
            error = self.assertRaises(exception.VolumeOpenError, self.open, location, secret=secret)
            self.assertIn("Volume vol: ", str(error))
            self.assertIn(sentence, str(error))

    # Beside the guest's QEMU

    def test_the_lock_that_a_guests_qemu_holds_is_not_taken(self) -> None:
        self.image(content(2 * OBJECT))
        disk = f"rbd:{POOL}/{IMAGE}:id=guest:conf={self.ceph.configuration}"
        qemu = processes.spawn(
            ["qemu-io", "-f", "raw", "--cache", "none", disk],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(self.quit, qemu)
        self.write(qemu, 0x11)
        before = self.holders()
        self.assertEqual(1, len(before["lockers"]), before)
        self.assertEqual(1, len(before["watchers"]), before)

        reader = self.open()
        buffer = volumes.aligned_buffer(BLOCK)
        for pattern in (0x11, 0x22, 0x33):
            self.write(qemu, pattern)
            reader.read_into(0, buffer)
            self.assertEqual(bytes([pattern]) * BLOCK, bytes(buffer))
            self.assertEqual(before, self.holders())

    def write(self, qemu: "subprocess.Popen[str]", pattern: int) -> None:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write(f"write -P {pattern} 0 4k\n")
        qemu.stdin.flush()
        said = qemu.stdout.readline()
        while "wrote" not in said:
            self.assertNotEqual("", said, "qemu-io has ended")
            said = qemu.stdout.readline()

    def quit(self, qemu: "subprocess.Popen[str]") -> None:
        """Not killed, as its image has a watcher for half a minute then, and cannot be removed."""
        assert qemu.stdin is not None
        with contextlib.suppress(OSError):
            qemu.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            qemu.wait(60)
        processes.end(qemu)

    def holders(self) -> dict[str, Any]:
        """Who has the image's lock, and who watches it."""
        return self.ceph.holders(POOL, IMAGE)

    # A Ceph that fails; here the reader waits for ``SHORT`` seconds only

    def reads(self, reader: volumes.VolumeReader, count: int) -> list[Any]:
        """What becomes of reads of as many blocks; it must be told within a few time limits."""
        begun = time.monotonic()
        results = try_blocks(reader, count)
        # Some limits; the rest is for a busy machine.
        self.assertLess(time.monotonic() - begun, 30)
        return results

    def assert_recovers(
        self, data: bytes, reader: volumes.VolumeReader, hung: bool = False
    ) -> None:
        """Reads come to work again, with the same reader.

        :param hung: the OSD has hung, and may hang on by itself, for all of its clients: it is
            started anew then.
        """
        begun = time.monotonic()
        while any(self.reads(reader, 1)):
            waited = time.monotonic() - begun
            if waited > 60 and hung:
                self.ceph.kill_osd()
                self.ceph.start_osd()
                hung = False
            self.assertLess(waited, 180, "the reader does not recover")
        self.assert_reads(data, reader)

    def test_reads_of_a_ceph_that_hangs_fail_in_time_and_work_again_later(self) -> None:
        data = content()
        self.image(data)
        reader = self.open(timeout=SHORT)
        with self.ceph.frozen("osd"):
            for error in self.reads(reader, 1):
                self.assertIsInstance(error, exception.VolumeTimeoutError)
                self.assertIn("Ceph has not answered in time", str(error))
            self.assertRaises(exception.VolumeOpenError, self.open, timeout=SHORT)
        self.assert_recovers(data, reader, hung=True)

    def test_an_osd_that_is_killed_in_mid_read_fails_reads_until_it_is_back(self) -> None:
        data = content()
        self.image(data)
        reader = self.open(timeout=SHORT)
        results: list[Any] = []
        failed = threading.Event()

        def read() -> None:
            while not failed.is_set():
                results.extend(self.reads(reader, 1))
                if results[-1] is not None:
                    failed.set()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            wait_until(lambda: results, "the first blocks are read")
            self.ceph.kill_osd()
            self.assertTrue(failed.wait(60), "reads neither fail nor work")
        finally:
            failed.set()
            thread.join()
            self.ceph.start_osd()
        self.assertIsNone(results[0])
        self.assertIsInstance(results[-1], exception.VolumeReadError)
        self.assert_recovers(data, reader)

    def test_an_osd_that_is_elsewhere_after_a_crash_is_found_again(self) -> None:
        data = content()
        self.image(data)
        reader = self.open(timeout=SHORT)
        wait_until(lambda: not any(self.reads(reader, 1)), "the reader reads")
        self.ceph.kill_osd(noticed=False)
        try:
            # A broken connection has the reader ask for the next map, which knows nothing yet
            self.assertIsInstance(self.reads(reader, 1)[0], exception.VolumeTimeoutError)
            self.ceph.command("osd set", key="noout")
            self.addCleanup(self.ceph.command, "osd unset", key="noout")
            self.assertIsInstance(self.reads(reader, 1)[0], exception.VolumeTimeoutError)
        finally:
            self.ceph.start_osd()
        self.assert_recovers(data, reader)

    def test_closing_does_not_hang_with_ceph_nor_disturb_reads_under_way(self) -> None:
        self.image(content(BLOCK))
        reader = self.open(timeout=SHORT)
        results: list[Any] = []
        with self.ceph.frozen("osd", "mon"):
            thread = threading.Thread(target=lambda: results.extend(self.reads(reader, 1)))
            thread.start()
            wait_until(lambda: reader._uses.reading, "the read is under way")
            begun = time.monotonic()
            reader.close()
            self.assertLess(time.monotonic() - begun, 30)
            thread.join(60)
        self.assertIn("Ceph has not answered in time", str(results[0]))
        error = self.assertRaises(
            exception.VolumeReadError, reader.read_into, 0, volumes.aligned_buffer(BLOCK)
        )
        self.assertIn("closed", str(error))

    def test_an_idle_reader_closes_while_ceph_hangs(self) -> None:
        self.image(content(BLOCK))
        reader = self.open(timeout=SHORT)
        with self.ceph.frozen("osd", "mon"):
            begun = time.monotonic()
            reader.close()
            self.assertLess(time.monotonic() - begun, 30)

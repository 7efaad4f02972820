# SPDX-License-Identifier: Apache-2.0
"""Images that a real qemu-storage-daemon opens, beside a QEMU that writes to them."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nova_dmigrate import exception, volumes
from tests import base
from tests.lab import processes
from tests.lab.relays import wait_until
from tests.lab.volume_reads import try_blocks, try_reads

BLOCK = 4096
CLUSTER = 65536
SIZE = 8 << 20
PASSPHRASE = "correct horse battery staple"
#: Seconds of the reader; a busy machine takes its time, and nothing here depends on how long.
TIMEOUT = 20.0
#: Where it shall not wait.
SHORT = 3.0

LUKS_OPTIONS = ("-o", "key-secret=key,iter-time=100")

#: A process that opens an image, tells the number of its daemon, and waits to be ended.
HOLDER = """
import sys
from pathlib import Path
from nova_dmigrate import volumes
location, directory = sys.argv[1:]
access = volumes.VolumeAccess(timeout=20, runtime_directory=Path(directory))
reader = volumes.NbdReader(volumes.VolumeSpec("vol", "nbd", location), access)
print(reader._daemon._process.pid, flush=True)
sys.stdin.read()
"""


def content(seed: int = 7) -> bytes:
    """With a hole of half its length, at a third."""
    data = bytearray(random.Random(seed).randbytes(SIZE))
    data[SIZE // 4 : 3 * SIZE // 4] = bytes(SIZE // 2)
    return bytes(data)


def missing() -> str | None:
    for program in ("qemu-storage-daemon", "qemu-img", "qemu-io", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def run(*command: object) -> None:
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr}")


def convert(raw: Path, path: Path, kind: str, key: str, *options: str) -> None:
    """An image of a raw one. ``key``: option of QEMU's for the object of that name."""
    for attempt in range(10):
        try:
            run("qemu-img", "convert", "--object", key, "-f", "raw", "-O", kind, *options, raw,
                path)  # fmt: skip
            break
        except AssertionError as error:
            # QEMU measures how fast it derives keys by a clock that may be too coarse
            if "accurate CPU usage" not in str(error) or attempt == 9:
                raise


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Writer:
    """A QEMU that has an image open for writing, with its locks, as a guest's has."""

    def __init__(self, path: Path | str, kind: str) -> None:
        command = ["qemu-io", "-f", kind, "--cache", "none", str(path)]
        if kind == "luks":
            options = f"driver=luks,key-secret=key,file.filename={path},cache.direct=on"
            secret = f"secret,id=key,data={PASSPHRASE}"
            command = ["qemu-io", "--object", secret, "--image-opts", options]
        self.process = processes.spawn(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            bufsize=0,
        )  # fmt: skip
        self._answer()

    def write(self, pattern: int, offset: int, length: int = BLOCK) -> None:
        """Write bytes of ``pattern``, and have them, and where they are, on the image."""
        said = self._command(f"write -P {pattern} {offset} {length}")
        if "wrote" not in said:
            raise AssertionError(f"qemu-io: {said}")
        self._command("flush")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def kill(self) -> None:
        processes.end(self.process)

    def _command(self, text: str) -> str:
        self.process.stdin.write(f"{text}\n".encode())
        return self._answer()

    def _answer(self) -> str:
        """All that it says until it asks for the next command, without which it takes none."""
        said = b""
        while not said.endswith(b"qemu-io> "):
            part = self.process.stdout.read(4096)
            if not part:
                raise AssertionError(f"qemu-io has ended: {said.decode()}")
            said += part
        return said.decode()


class NbdTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(missing())
        self.here = self.make_directory()
        self.runtime = self.here / "run"
        self.runtime.mkdir()

    def image(self, kind: str, data: bytes, name: str = "image", *options: str) -> Path:
        """An image with this content; encrypted if its kind is, or the options say so."""
        raw, path = self.here / "content", self.here / name
        raw.write_bytes(data)
        if kind == "raw":
            raw.rename(path)
            return path
        if kind == "luks":
            options = (*LUKS_OPTIONS, *options)
        convert(raw, path, kind, f"secret,id=key,data={PASSPHRASE}", *options)
        raw.unlink()
        return path

    def writer(self, path: Path, kind: str) -> Writer:
        writer = Writer(path, kind)
        self.addCleanup(writer.close)
        return writer

    def open(self, location: str, secret: str = "", timeout: float = TIMEOUT) -> volumes.NbdReader:
        access = volumes.VolumeAccess(timeout=timeout, runtime_directory=self.runtime)
        spec = volumes.VolumeSpec("vol", "nbd", location, secret)
        reader = volumes.open_volume(spec, access)
        assert isinstance(reader, volumes.NbdReader)
        self.addCleanup(reader.close)
        self.assertEqual([], os.listdir(self.runtime))
        return reader

    def daemon(self, reader: volumes.NbdReader) -> int:
        process = reader._daemon._process
        assert process is not None
        return process.pid

    def read(self, reader: volumes.VolumeReader, offset: int, length: int = BLOCK) -> bytes:
        buffer = volumes.aligned_buffer(length)
        reader.read_into(offset, buffer)
        return bytes(buffer)

    def assert_reads(self, data: bytes, reader: volumes.VolumeReader) -> None:
        """The reader reads all blocks as they are."""
        self.assertEqual(len(data), reader.size)
        buffer = volumes.aligned_buffer(len(data))
        buffer[:] = b"\xaa" * len(data)
        for start in range(0, len(data), 3 << 20):
            reader.read_into(start, buffer[start : start + (3 << 20)])
        self.assertTrue(data == buffer)


class ReadTest(NbdTestCase):
    def test_images_of_all_formats_are_read_with_their_holes(self) -> None:
        data = content()
        for kind in ("raw", "qcow2", "luks"):
            path = self.image(kind, data, kind)
            secret = PASSPHRASE if kind == "luks" else ""
            self.assert_reads(data, self.open(f"{kind}:{path}", secret))

    def test_an_encrypted_and_compressed_qcow2_image_is_read(self) -> None:
        data = content()
        encrypted = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100"
        path = self.image("qcow2", data, "encrypted", "-o", encrypted)
        self.assert_reads(data, self.open(f"qcow2:{path}", PASSPHRASE))
        path = self.image("qcow2", data, "compressed", "-c", "-o", "cluster_size=512k")
        self.assert_reads(data, self.open(f"qcow2:{path}"))

    def test_backing_files_are_read_through_all_layers(self) -> None:
        data = bytearray(content())
        self.image("raw", bytes(data), "base")
        for below, kind, pattern in (("base", "raw", 1), ("middle", "qcow2", 2)):
            above = self.here / ("middle" if below == "base" else "top")
            run("qemu-img", "create", "-f", "qcow2", "-b", below, "-F", kind, above)
            offset = pattern * CLUSTER
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {BLOCK}", above)
            data[offset : offset + BLOCK] = bytes([pattern]) * BLOCK
        self.assert_reads(bytes(data), self.open(f"qcow2:{self.here / 'top'}"))

    def test_many_ranges_are_each_read_or_refused_by_themselves(self) -> None:
        data = content()
        reader = self.open(f"qcow2:{self.image('qcow2', data)}")
        numbers = random.Random(1).choices(range(-1, SIZE // BLOCK + 2), k=200)
        buffers = [memoryview(bytearray(BLOCK + 1))[1:] for _ in numbers]
        results = try_reads(
            reader, [(number * BLOCK, part) for number, part in zip(numbers, buffers, strict=True)]
        )
        self.assertEqual(len(numbers), len(results))
        for number, part, error in zip(numbers, buffers, results, strict=True):
            if 0 <= number < SIZE // BLOCK:
                self.assertIsNone(error)
                self.assertEqual(data[number * BLOCK : (number + 1) * BLOCK], bytes(part))
            else:
                self.assertIsInstance(error, exception.VolumeBoundsError)
        pages = memoryview(bytearray(2 * BLOCK)).cast("B", (2, BLOCK))
        reader.read_into(BLOCK, pages)
        self.assertEqual(data[BLOCK : 3 * BLOCK], pages.tobytes())

    def test_many_threads_can_read_at_once(self) -> None:
        data = content()
        reader = self.open(f"qcow2:{self.image('qcow2', data)}")
        wrong = []

        def read(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(20):
                offset = chosen.randrange(SIZE // BLOCK - 16) * BLOCK
                if self.read(reader, offset, 16 * BLOCK) != data[offset : offset + 16 * BLOCK]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)
        self.assertLessEqual(len(reader._idle), 8)


class OpenTest(NbdTestCase):
    def refusal(self, location: str, secret: str = "") -> str:
        """Why an image is not opened."""
        before = processes_of("qemu-storage-daemon", os.getpid())
        error = self.assertRaises(exception.VolumeOpenError, self.open, location, secret)
        self.assertEqual(before, processes_of("qemu-storage-daemon", os.getpid()))
        self.assertEqual([], os.listdir(self.runtime))
        self.assertIn("Volume vol: ", str(error))
        return str(error)

    def test_what_cannot_be_opened_is_named(self) -> None:
        luks = self.image("luks", content(), "luks")
        raw = self.image("raw", content(), "raw")
        for location, secret, sentence in (
            (f"luks:{luks}", "wrong", "Invalid password, cannot unlock any keyslot"),
            (f"luks:{luks}", "", "key-secret' is required"),
            (f"luks:{raw}", PASSPHRASE, "Volume is not in LUKS format"),
            (f"qcow2:{raw}", "", f"{raw} is no qcow2 image"),
            (f"raw:{self.here}/none", "", f"{self.here}/none: No such file or directory"),
            (f"raw:{self.here}", "", "is neither a block device nor a regular file"),
            ("/dev/vdb", "", "does not begin with a format"),
        ):
            self.assertIn(sentence, self.refusal(location, secret))

    def test_a_passphrase_is_in_no_argument_and_in_no_file(self) -> None:
        path = self.image("luks", content())
        reader = self.open(f"luks:{path}", PASSPHRASE)
        for name in ("cmdline", "environ"):
            told = Path(f"/proc/{self.daemon(reader)}/{name}").read_bytes()
            self.assertNotIn(PASSPHRASE.encode(), told)
        self.assertNotIn(PASSPHRASE, self.log.output)
        self.assertNotIn(PASSPHRASE, self.refusal(f"raw:{self.here}/none", PASSPHRASE))

    def test_an_image_stays_as_it_is_even_if_its_qemu_was_killed(self) -> None:
        path = self.image("qcow2", content(), "image", "-o", "lazy_refcounts=on,compat=1.1")
        writer = self.writer(path, "qcow2")
        writer.write(1, SIZE // 2)
        writer.kill()  # the image is marked as one that was not closed

        def marked() -> bool:
            command = ["qemu-img", "info", "--output=json", path]
            told = subprocess.run(command, capture_output=True, check=True).stdout
            return bool(json.loads(told)["dirty-flag"])

        self.assertTrue(marked())

        def state() -> tuple[object, ...]:
            return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns

        before = state()
        reader = self.open(f"qcow2:{path}")
        self.assertEqual(bytes([1]) * BLOCK, self.read(reader, SIZE // 2))
        reader.close()
        self.assertEqual(before, state())
        self.assertTrue(marked())


class BesideWriterTest(NbdTestCase):
    """With a QEMU that has the image's locks."""

    def locks(self, path: Path) -> list[str]:
        """Locks of a file, by whomever."""
        place = f":{path.stat().st_ino} "
        return [line for line in Path("/proc/locks").read_text().splitlines() if place in line]

    def test_no_lock_is_taken(self) -> None:
        self.image("raw", content(), "base")
        top = self.here / "top"
        run("qemu-img", "create", "-f", "qcow2", "-b", "base", "-F", "raw", top)
        self.open(f"qcow2:{top}")
        for path in (top, self.here / "base"):
            self.assertEqual([], self.locks(path))
        writer = self.writer(top, "qcow2")
        writer.write(1, 0)
        self.assertNotEqual([], self.locks(top))

    def test_a_qemu_that_was_there_before_and_one_that_comes_later_are_not_disturbed(self) -> None:
        for kind in ("raw", "qcow2", "luks"):
            path = self.image(kind, content(), kind)
            secret = PASSPHRASE if kind == "luks" else ""
            first = self.writer(path, kind)
            first.write(1, 0)
            reader = self.open(f"{kind}:{path}", secret)
            for pattern in (2, 3):
                first.write(pattern, 0)
                self.assertEqual(bytes([pattern]) * BLOCK, self.read(reader, 0))
            first.close()
            second = self.writer(path, kind)
            for pattern in (4, 5):
                second.write(pattern, 0)
                self.assertEqual(bytes([pattern]) * BLOCK, self.read(reader, 0))
            reader.close()
            second.write(6, 0)
            second.close()

    def test_new_clusters_are_seen_where_the_file_had_room_for_them(self) -> None:
        # As on a device. A part of the tables stands for 1 MiB
        path = self.image("qcow2", content(), "image", "-o", "cluster_size=16k")
        os.truncate(path, 2 * SIZE)
        writer = self.writer(path, "qcow2")
        reader = self.open(f"qcow2:{path}")
        first, second = SIZE // 4, SIZE // 2
        writer.write(8, first, CLUSTER)
        self.assertEqual(bytes([8]) * BLOCK, self.read(reader, first))
        self.assertEqual(bytes(BLOCK), self.read(reader, second))
        writer.write(9, second, CLUSTER)
        for elsewhere in (0, 1 << 20, SIZE - BLOCK):
            self.read(reader, elsewhere)
        self.assertEqual(bytes([9]) * BLOCK, self.read(reader, second))

    def test_what_a_file_has_grown_by_is_seen_by_readers_that_come_later(self) -> None:
        path = self.image("qcow2", content())
        writer = self.writer(path, "qcow2")
        before = self.open(f"qcow2:{path}")
        writer.write(8, SIZE // 2, CLUSTER)
        self.assertEqual(bytes(BLOCK), self.read(before, SIZE // 2))
        after = self.open(f"qcow2:{path}")
        self.assertEqual(bytes([8]) * BLOCK, self.read(after, SIZE // 2))


class FailureTest(NbdTestCase):
    def blocks(self, reader: volumes.VolumeReader, count: int = 40) -> list[Any]:
        """What becomes of reads of as many blocks; it must be told in a few time limits."""
        begun = time.monotonic()
        results = try_blocks(reader, count)
        self.assertLess(time.monotonic() - begun, 30)
        return results

    def test_with_a_daemon_that_was_killed_all_reads_fail_at_once(self) -> None:
        reader = self.open(f"qcow2:{self.image('qcow2', content())}")
        self.assertEqual({None}, set(self.blocks(reader)))
        os.kill(self.daemon(reader), signal.SIGKILL)
        for _ in range(3):
            for error in self.blocks(reader):
                self.assertIsInstance(error, exception.VolumeReadError)
        said = "its qemu-storage-daemon has ended: it was killed"
        wait_until(lambda: said in str(self.blocks(reader)[0]), "the end is noticed")

    def test_a_daemon_that_is_killed_in_mid_read_fails_reads_of_all_threads(self) -> None:
        reader = self.open(f"qcow2:{self.image('qcow2', content())}")
        results: list[list[Any]] = [[] for _ in range(4)]

        def read(found: list[Any]) -> None:
            while not found or found[-1] is None:
                found.extend(self.blocks(reader))

        threads = [threading.Thread(target=read, args=(found,)) for found in results]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(results), "all threads have read")
        os.kill(self.daemon(reader), signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        for found in results:
            self.assertIsNone(found[0])
            self.assertIsInstance(found[-1], exception.VolumeReadError)

    def test_reads_of_a_daemon_that_hangs_fail_in_time_and_work_again_later(self) -> None:
        data = content()
        reader = self.open(f"qcow2:{self.image('qcow2', data)}", timeout=SHORT)
        os.kill(self.daemon(reader), signal.SIGSTOP)
        try:
            for error in self.blocks(reader, 3):
                self.assertIsInstance(error, exception.VolumeTimeoutError)
                self.assertIn(f"no answer for {SHORT:g} seconds", str(error))
        finally:
            os.kill(self.daemon(reader), signal.SIGCONT)
        wait_until(lambda: not any(self.blocks(reader)), "the reader recovers")
        self.assert_reads(data, reader)

    def test_closing_ends_a_daemon_that_hangs_and_does_not_disturb_reads_under_way(self) -> None:
        reader = self.open(f"raw:{self.image('raw', content())}", timeout=SHORT)
        daemon = self.daemon(reader)
        results: list[Any] = []
        os.kill(daemon, signal.SIGSTOP)
        thread = threading.Thread(target=lambda: results.extend(self.blocks(reader)))
        thread.start()
        wait_until(lambda: reader._uses.reading, "the read is under way")
        reader.close()
        self.assertTrue(is_running(daemon))
        thread.join(60)
        self.assertIn("no answer", str(results[0]))
        wait_until(lambda: not is_running(daemon), "the daemon is gone")
        error = self.assertRaises(exception.VolumeReadError, self.read, reader, 0)
        self.assertIn("its reader was closed", str(error))

    def test_closing_ends_the_daemon_and_its_thread(self) -> None:
        reader = self.open(f"raw:{self.image('raw', content())}")
        daemon = self.daemon(reader)
        self.assertTrue(is_running(daemon))
        reader.close()
        reader.close()
        self.assertFalse(is_running(daemon))
        wait_until(
            lambda: "storage-daemon" not in [each.name for each in threading.enumerate()],
            "the thread has ended",
        )

    def test_the_daemon_ends_with_its_process_however_that_ends(self) -> None:
        location = f"raw:{self.image('raw', content())}"
        for end in (
            lambda holder: holder.kill(),
            lambda holder: holder.terminate(),
            lambda holder: holder.stdin.close(),  # it ends without closing the reader
        ):
            holder = processes.spawn(
                [sys.executable, "-c", HOLDER, location, self.runtime],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.addCleanup(processes.end, holder)
            daemon = int(holder.stdout.readline())
            self.assertTrue(is_running(daemon))
            end(holder)
            holder.wait(30)
            wait_until(lambda pid=daemon: not is_running(pid), "the daemon is gone")
            self.assertEqual([], os.listdir(self.runtime))


def processes_of(program: str, parent: int) -> list[int]:
    """Processes that run this program, as children of that one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if name == program[:15] and int(rest.split()[1]) == parent:
                found.append(int(path.parent.name))
    return found

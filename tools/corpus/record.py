# SPDX-License-Identifier: Apache-2.0
"""Records one migration and what QEMU itself says of it.

The stream goes through a tee to a destination QEMU of the same version. Nothing in the facts comes
from parsing the stream: block names and sizes are what ``info ramblock`` prints, the numbers of
records are ``query-migrate``'s, the contents are what lies in the destination's memory afterwards.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.corpus.emulators import Emulator
from tools.corpus.guests import DEBUG_PORT, READY, GuestFiles
from tools.corpus.process import POLL, Qemu, QmpError
from tools.corpus.tee import Tee
from tools.corpus.variants import HOT_MEMORY, OLDEST_PC, Memory, Variant

GUEST_TIMEOUT = 60.0
MIGRATION_TIMEOUT = 60.0
ATTEMPTS = 8
HUGEPAGE = 2 << 20
NR_HUGEPAGES = pathlib.Path("/proc/sys/vm/nr_hugepages")

# Slow enough for several passes over what the guest dirties in the meantime.
BANDWIDTH = 16 << 20
PATIENCE_MS = 1  # QEMU does not stop the guest for as long as more than this is left to send
STOP_NOW_MS = 10_000

_RAMBLOCK = re.compile(
    r"^\s*(\S+)\s+(\d+) (B|KiB|MiB)\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+", re.M
)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}


class RecordingError(Exception):
    """A migration did not end as it should."""


class HugepagesError(RecordingError):
    """The kernel gives no hugepages."""


@dataclass(frozen=True)
class Recording:
    """A stream and its entry in the manifest (without the file's name)."""

    stream: bytes
    facts: dict[str, Any]


def record(variant: Variant, emulator: Emulator) -> Recording:
    """Run the guest and migrate it, again if QEMU happened not to do what the variant is about.

    :raises RecordingError: when guest or migration fail, or nothing of the kind came in ATTEMPTS
    :raises QmpError: when QEMU refuses a command of ours
    """
    for _ in range(ATTEMPTS):
        recording = _attempt(variant, emulator)
        statistics = recording.facts["statistics"]
        if all(statistics[name] for name in variant.must_have):
            return recording
    raise RecordingError(f"there was no {' and '.join(variant.must_have)}: {statistics}")


def _attempt(variant: Variant, emulator: Emulator) -> Recording:
    with tempfile.TemporaryDirectory(prefix="ndm-corpus-", dir=_shared_memory()) as name:
        with hugepages(2 * variant.memory_size // HUGEPAGE, variant.memory is Memory.HUGEPAGES):
            return _Session(variant, emulator, pathlib.Path(name)).run()


def _shared_memory() -> str | None:
    """A tmpfs for the destination's memory: post-copy wants it there. None: the usual place."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@contextlib.contextmanager
def hugepages(count: int, wanted: bool = True) -> Iterator[None]:
    """Adds so many 2 MiB pages to the kernel's pool for a while.

    :raises HugepagesError: when the kernel does not give them
    """
    if not wanted:
        yield
        return
    before = int(NR_HUGEPAGES.read_text())
    try:
        try:
            NR_HUGEPAGES.write_text(str(before + count))
        except OSError as error:
            raise HugepagesError(f"no hugepages: {error}") from error
        if int(NR_HUGEPAGES.read_text()) < before + count:
            raise HugepagesError("no hugepages: the kernel gives fewer than asked for")
        yield
    finally:
        with contextlib.suppress(OSError):
            NR_HUGEPAGES.write_text(str(before))


class _Session:
    def __init__(self, variant: Variant, emulator: Emulator, directory: pathlib.Path) -> None:
        self.variant = variant
        self.emulator = emulator
        self.directory = directory
        self.files = GuestFiles.write(directory)

    def run(self) -> Recording:
        incoming, outgoing = self.directory / "incoming", self.directory / "outgoing"
        console = self.directory / "console"
        with (
            Qemu("source", self._argv("source", console), self.directory) as source,
            Qemu(
                "destination",
                [*self._argv("destination"), "-S", "-incoming", "defer"],
                self.directory,
            ) as destination,
        ):
            self._wait_for_guest(source, console)
            for qemu in (source, destination):
                self._configure(qemu)
            destination("migrate-incoming", uri=f"unix:{incoming}")
            with Tee(outgoing, incoming) as tee:
                statistics = self._migrate(source, outgoing)
                self._wait_for_destination(destination)
                stream = tee.main_stream()
                channels = tee.channels()
            facts = {
                "qemu": self.emulator.version,
                "machine": _machine_type(source),
                "capabilities": list(self.variant.capabilities),
                "memory": self.variant.memory.value,
                "channels": channels,
                "size": len(stream),
                "sha256": hashlib.sha256(stream).hexdigest(),
                "blocks": _blocks(source),
                "statistics": statistics,
                "contents": self._contents(destination),
            }
        return Recording(stream, facts)

    # ----------------------------------------------------------------- command lines

    def _argv(self, side: str, console: pathlib.Path | None = None) -> list[str]:
        variant = self.variant
        size = variant.memory_size
        machine = variant.machine[self.emulator.series]
        if machine == OLDEST_PC:
            machine = self.emulator.oldest_pc()
        argv = [
            *self.emulator.command,
            *("-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-m", f"size={size}B" + (",maxmem=1G" if variant.maximum_memory else "")),
            "-chardev",
            f"file,id=console,path={console}" if console else "null,id=console",
            *("-device", f"isa-debugcon,iobase={DEBUG_PORT:#x},chardev=console"),
        ]
        if variant.tiny:
            argv += ["-bios", str(self.files.bios)]
        else:
            disk = f"file.filename={self.files.disk},file.locking=off,format=raw,if=ide,index=0"
            argv += ["-drive", disk]
        if variant.maximum_memory:
            argv += ["-object", HOT_MEMORY]
        for device in variant.devices:
            argv += ["-device", device]
        if variant.memory is Memory.NUMA:
            for node in range(2):
                argv += ["-object", self._backend(side, f"ram-node{node}", size // 2)]
                argv += ["-numa", f"node,nodeid={node},memdev=ram-node{node}"]
            return [*argv, "-machine", machine]
        argv += ["-machine", machine]
        backend = self._backend(side, "pc.ram", size)
        if backend:
            argv += ["-object", backend]
            argv[-3] += ",memory-backend=pc.ram"
        return argv

    def _backend(self, side: str, name: str, size: int) -> str:
        """The memory object, as libvirt names it; "" where the machine makes its own.

        The destination's memory is a file, or a memfd, whatever the source has: that is where its
        contents are read from.
        """
        memory = self.variant.memory
        common = f"id={name},size={size},share=on,x-use-canonical-path-for-ramblock-id=off"
        if memory is Memory.HUGEPAGES:
            return f"memory-backend-memfd,hugetlb=on,hugetlbsize=2M,{common}"
        if side == "source" and memory is Memory.DEFAULT:
            return ""
        if memory is Memory.FILE:
            side = "destination"  # one file for both: nothing needs to be sent
        return f"memory-backend-file,mem-path={self.directory / f'{side}.{name}'},{common}"

    # --------------------------------------------------------------------- migration

    def _wait_for_guest(self, source: Qemu, console: pathlib.Path) -> None:
        deadline = time.monotonic() + GUEST_TIMEOUT
        while not (console.exists() and READY in console.read_bytes()):
            if time.monotonic() > deadline or source.process.poll() is not None:
                raise RecordingError(f"the guest does not start: {source.log()}")
            time.sleep(POLL)

    def _configure(self, qemu: Qemu) -> None:
        capabilities = [{"capability": c, "state": True} for c in self.variant.capabilities]
        qemu("migrate-set-capabilities", capabilities=capabilities)
        limits = {"max-bandwidth": BANDWIDTH, "downtime-limit": PATIENCE_MS}
        qemu("migrate-set-parameters", **limits, **self.variant.parameters)

    def _migrate(self, source: Qemu, outgoing: pathlib.Path) -> dict[str, int]:
        source("migrate", uri=f"unix:{outgoing}")
        deadline = time.monotonic() + MIGRATION_TIMEOUT
        hurried = False
        while time.monotonic() < deadline:
            status = source("query-migrate")
            state = status.get("status", "none")
            if state == "completed":
                return _statistics(status)
            if state in ("failed", "cancelled"):
                raise RecordingError(f"{state}: {status.get('error-desc')} {source.log()}")
            if state == "pre-switchover":
                source("migrate-continue", state="pre-switchover")
            passes = status.get("ram", {}).get("dirty-sync-count", 0)
            if state == "active" and passes >= self.variant.passes and not hurried:
                hurried = True
                if self.variant.switch:
                    source("migrate-start-postcopy")
                else:
                    source("migrate-set-parameters", **{"downtime-limit": STOP_NOW_MS})
            time.sleep(POLL)
        raise RecordingError(f"no end: {source('query-migrate')}")

    def _wait_for_destination(self, destination: Qemu) -> None:
        deadline = time.monotonic() + MIGRATION_TIMEOUT
        while time.monotonic() < deadline:
            state = destination("query-migrate").get("status")
            if state == "completed":
                return
            if state == "failed":
                raise RecordingError(f"the destination failed: {destination.log()}")
            time.sleep(POLL)
        raise RecordingError("the destination does not end")

    # ------------------------------------------------------------------------- facts

    def _contents(self, destination: Qemu) -> dict[str, str]:
        """SHA-256 of the destination's main memory, by block."""
        names = ["ram-node0", "ram-node1"] if self.variant.memory is Memory.NUMA else ["pc.ram"]
        return {name: _sha256(self._memory_file(destination, name)) for name in names}

    def _memory_file(self, destination: Qemu, name: str) -> pathlib.Path:
        if self.variant.memory is not Memory.HUGEPAGES:
            return self.directory / f"destination.{name}"
        for link in pathlib.Path(f"/proc/{destination.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memfd:memory-backend-memfd" in os.readlink(link):
                    return link
        raise RecordingError("the destination has no memfd")


def _sha256(path: pathlib.Path) -> str:
    # A hugetlb memfd is read in whole pages only.
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        file.seek(0)
        while data := file.read(HUGEPAGE):
            digest.update(data)
    return digest.hexdigest()


def _machine_type(qemu: Qemu) -> str:
    name = str(qemu("qom-get", path="/machine", property="type"))
    return name.removesuffix("-machine")


def _blocks(qemu: Qemu) -> dict[str, dict[str, int]]:
    """Name to used length and page size of every RAMBlock, from ``info ramblock``."""
    text = qemu.monitor("info ramblock")
    found = {
        name: {"length": int(used, 16), "page_size": int(count) * _UNITS[unit]}
        for name, count, unit, used in _RAMBLOCK.findall(text)
    }
    if not found:
        raise QmpError(f"info ramblock is not understood: {text}")
    return found


def _statistics(status: dict[str, Any]) -> dict[str, int]:
    ram = status["ram"]
    cache = status.get("xbzrle-cache", {})
    return {
        "pages": ram["normal"],
        "zeros": ram["duplicate"],
        # The cache's "pages" are its hits, also of pages that turned out unchanged, for which there
        # is no record; its "bytes" are the records without the first 8 of each.
        "delta_hits": cache.get("pages", 0),
        "delta_bytes": cache.get("bytes", 0),
        "passes": ram["dirty-sync-count"],
        "post_copy_bytes": ram.get("postcopy-bytes", 0),
    }

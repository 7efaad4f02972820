# SPDX-License-Identifier: Apache-2.0
"""Volumes for the agent's tests: file systems on loop devices.

One is mounted in a mount namespace of its own, which a holder process keeps: when that ends, for
whatever reason, mount and loop device are gone.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.lab import processes

BLOCK = 4096
_READ_BLOCKS = 256
_PARTITION_SECTOR = 2048
_MKFS: Mapping[str, Sequence[str]] = {
    # Small ones would have smaller blocks
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}


class DatabaseError(Exception):
    """A server did not do what the test needs."""


class LoopVolume:
    """A file system on a loop device, mounted at ``mountpoint`` in a namespace of its own.

    ``device``: the loop device. ``enter``: what to put before a command to run it there.
    """

    def __init__(
        self, directory: Path, megabytes: int, kind: str = "ext4", partitioned: bool = False
    ) -> None:
        self.mountpoint = directory / "volume"
        self._image = directory / "volume.img"
        self._megabytes = megabytes
        self._kind = kind
        self._partitioned = partitioned
        self._holder: subprocess.Popen[bytes] | None = None
        self.device = Path()
        self.enter: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The device's name in the kernel."""
        return self.device.name

    def __enter__(self) -> "LoopVolume":
        self.mountpoint.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(self._megabytes << 20)
        # Once it is mounted, the loop device goes with its last user (autoclear).
        loop = ["losetup", "--find", "--show"]
        if self._partitioned:
            loop.append("--partscan")
        self.device = Path(run([*loop, str(self._image)]).strip())
        try:
            if self._partitioned:
                # Told to the kernel directly: this one may know no partition tables.
                begin, sectors = _PARTITION_SECTOR, self._megabytes << 11
                run(["addpart", str(self.device), "1", str(begin), str(sectors - begin)])
            self._mount(f"{self.device}p1" if self._partitioned else str(self.device))
        finally:
            run(["losetup", "--detach", str(self.device)])
        return self

    def _mount(self, device: str) -> None:
        run([*_MKFS[self._kind], device])
        script = 'mount "$1" "$2" && echo mounted && exec cat >/dev/null'
        self._holder = processes.spawn(
            ["unshare", "--mount", "--propagation", "private", "--"]
            + ["sh", "-c", script, "sh", device, str(self.mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"mounted\n":
            self.__exit__()
            raise DatabaseError("the volume could not be mounted")
        self.enter = ("nsenter", f"--mount=/proc/{self.holder_pid}/ns/mnt", "--")

    @property
    def holder_pid(self) -> int:
        """The process that keeps the namespace: /proc/PID/root leads into it."""
        assert self._holder is not None
        return self._holder.pid

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            processes.end(self._holder)
            self._holder = None

    def file_blocks(self, path: Path) -> NDArray[np.int64]:
        """Blocks of the device that a file occupies, as filefrag says."""
        text = run([*self.enter, "filefrag", "-v", f"-b{BLOCK}", str(path)])
        spans = re.findall(r"^ *\d+: *\d+\.\. *\d+: *(\d+)\.\. *(\d+):", text, re.MULTILINE)
        blocks = [np.arange(int(first), int(last) + 1) for first, last in spans]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int64)

    def read_blocks(self, blocks: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Contents of blocks (u32 (n,)), read past all caches: u8 (n, 4096)."""
        content = np.empty((blocks.size, BLOCK), np.uint8)
        order = np.argsort(blocks, kind="stable")
        ordered = blocks[order].astype(np.int64)
        buffer = _aligned(_READ_BLOCKS * BLOCK)
        descriptor = os.open(self.device, os.O_RDONLY | os.O_DIRECT)
        try:
            at = 0
            while at < ordered.size:
                # What lies close together is read at once, gaps included.
                first = int(ordered[at])
                behind = int(np.searchsorted(ordered, first + _READ_BLOCKS))
                length = (int(ordered[behind - 1]) - first + 1) * BLOCK
                if os.preadv(descriptor, [memoryview(buffer)[:length]], first * BLOCK) != length:
                    raise DatabaseError(f"block {first} of {self.device} cannot be read")
                rows = buffer.reshape(-1, BLOCK)[ordered[at:behind] - first]
                content[order[at:behind]] = rows
                at = behind
        finally:
            os.close(descriptor)
        return content


def _aligned(size: int) -> NDArray[np.uint8]:
    """A buffer as O_DIRECT wants it."""
    buffer = np.empty(size + BLOCK, np.uint8)
    skip = -buffer.ctypes.data % BLOCK
    return buffer[skip : skip + size]


def run(argv: Sequence[str], timeout: float = 120) -> str:
    """The output of a command; DatabaseError if it fails."""
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if done.returncode:
        raise DatabaseError(f"{' '.join(argv)} failed: {done.stdout}{done.stderr}")
    return done.stdout

# SPDX-License-Identifier: Apache-2.0
"""What the source QEMU really sent: a tap on its migration stream, and a replay of it.

The promise of the relays is that the destination gets the last version that QEMU *sent* of each
page, and that is what `stream_mismatches` checks, with a parser that shares nothing with the one
under test. Where both QEMUs' memory differs but this finds nothing, QEMU itself has lost pages:
under TCG it does (see GuestSpec.ram_bytes).
"""

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tests.lab.guest import Guest

_PAGE = 4096
_TOP = struct.Struct(">Q")


class StreamTap:
    """Stands between the source QEMU and `target`, forwards both directions, records the stream.

    A process of its own. The target is dialled when QEMU has connected. A context manager.
    """

    def __init__(self, directory: Path, target: Path) -> None:
        from tests.lab import processes

        self._end = processes.end
        self.path = directory / "tap.sock"  # for QEMU to migrate to
        self.record = directory / "stream.bin"
        argv = [sys.executable, __file__, str(self.path), str(target), str(self.record)]
        self._process = processes.spawn(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"listening\n":
            raise RuntimeError("the stream tap did not start")

    def __enter__(self) -> "StreamTap":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._end(self._process)
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def finish(self, timeout: float = 30) -> Path:
        """Wait until both directions have ended; the record is whole then."""
        self._process.wait(timeout)
        return self.record


def stream_mismatches(destination: "Guest", record: Path) -> NDArray[np.int64]:
    """Pages of a paused destination that differ from what was sent last; as differing_pages."""
    from tests.lab.memory import compare_ram

    sent = replay_stream(record)
    blocks = destination.spec.block_names
    if destination.spec.shared:
        found, base = [], 0
        for name in blocks:
            found.append(compare_ram(sent[name], destination.ram_blocks[name]) + base)
            base += sent[name].shape[0]
        return np.concatenate(found)
    (name,) = blocks
    return compare_ram(destination.pmemsave(destination.directory / "ram.img"), sent[name])


def replay_stream(record: Path) -> dict[str, NDArray[np.uint8]]:
    """The RAMBlocks, (pages, 4096) each, that a pre-copy stream leaves (latest wins).

    :raises ValueError: something in the stream is not known, or it ends before RAM is complete.
    """
    data = np.memmap(record, np.uint8, "r")
    try:
        return _Replay(memoryview(data)).run()
    except (struct.error, IndexError) as error:
        raise ValueError(f"the stream ends early: {error}") from error


class _Replay:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.blocks: dict[str, NDArray[np.uint8]] = {}
        self.ram_section = -1
        self.last: NDArray[np.uint8] | None = None  # CONTINUE refers to it across sections

    def take(self, layout: str) -> Any:
        value = struct.unpack_from(">" + layout, self.data, self.at)
        self.at += struct.calcsize(">" + layout)
        return value[0]

    def text(self, length: int) -> str:
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def run(self) -> dict[str, NDArray[np.uint8]]:
        if self.take("I") != 0x5145564D or self.take("I") != 3:
            raise ValueError("not a migration stream")
        while True:
            kind = self.take("B")
            if kind == 0x07:
                self.configuration()
            elif kind == 0x08:
                command, length = self.take("H"), self.take("H")
                if command not in (1, 2, 3, 11):
                    raise ValueError(f"command {command}")
                self.at += length
            elif kind in (0x01, 0x02, 0x03):
                section = self.take("I")
                if kind == 0x01:
                    name = self.text(self.take("B"))
                    self.at += 8
                    if name != "ram":
                        raise ValueError(f"section {name}")
                    self.ram_section = section
                    self.setup()
                elif section != self.ram_section:
                    raise ValueError(f"section {section}")
                self.records()
                if self.data[self.at] == 0x7E:
                    self.at += 5
                if kind == 0x03:
                    return self.blocks
            else:
                raise ValueError(f"section type {kind:#x} at {self.at - 1}")

    def configuration(self) -> None:
        self.text(self.take("I"))
        while self.data[self.at] == 0x05:
            self.at += 1
            name = self.text(self.take("B"))
            self.at += 4
            if name == "configuration/capabilities":
                for _ in range(self.take("I")):
                    self.text(self.take("B"))
            elif name == "configuration/uuid":
                self.at += 16
            else:
                raise ValueError(f"subsection {name}")

    def setup(self) -> None:
        total = self.take("Q") & ~0xFFF
        while total > 0:
            name = self.text(self.take("B"))
            size = self.take("Q")
            self.blocks[name] = np.zeros((-(-size // _PAGE), _PAGE), np.uint8)
            total -= size

    def records(self) -> None:
        data, at, block = self.data, self.at, self.last
        while True:
            (head,) = _TOP.unpack_from(data, at)
            at += 8
            flags, page = head & 0xFFF, head >> 12
            if flags & ~0x20 in (0x10, 0x200):
                if flags & 0x10:
                    break
                continue
            if not flags & 0x20:
                end = at + 1 + data[at]
                block = self.last = self.blocks[bytes(data[at + 1 : end]).decode()]
                at = end
            if block is None:
                raise ValueError(f"a RAM record at {at - 8} continues no block")
            kind = flags & ~0x20
            if kind == 0x08:
                block[page] = data[at : at + _PAGE]
                at += _PAGE
            elif kind == 0x02:
                block[page] = data[at]
                at += 1
            elif kind == 0x40:
                length = int.from_bytes(data[at + 1 : at + 3], "big")
                _apply_delta(block[page], data[at + 3 : at + 3 + length])
                at += 3 + length
            else:
                raise ValueError(f"RAM record with flags {flags:#x} at {at - 8}")
        self.at = at


def _apply_delta(page: NDArray[np.uint8], delta: memoryview) -> None:
    """XBZRLE: alternating lengths (ULEB128, up to two bytes) of what stays and what follows."""
    at = place = 0

    def length() -> int:
        nonlocal at
        value = delta[at]
        at += 1
        if value & 0x80:
            value = (value & 0x7F) | delta[at] << 7
            at += 1
        return value

    while at < len(delta):
        place += length()
        if at < len(delta):
            count = length()
            page[place : place + count] = delta[at : at + count]
            at += count
            place += count


def _pump(source: socket.socket, sink: socket.socket, record: Any) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            if record is not None:
                record.write(buffer[:count])
            sink.sendall(buffer[:count])
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _main(path: str, target: str, record: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    print("listening", flush=True)
    qemu, _ = listener.accept()
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(target)
    with open(record, "wb") as file:
        back = threading.Thread(target=_pump, args=(peer, qemu, None))
        back.start()
        _pump(qemu, peer, file)
        back.join()


if __name__ == "__main__":
    _main(*sys.argv[1:])

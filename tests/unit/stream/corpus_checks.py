# SPDX-License-Identifier: Apache-2.0
"""What must hold for every recorded stream, whether from the corpus or recorded a moment ago.

The facts against which the parser is held come from QEMU alone: ``info ramblock``,
``query-migrate``, the destination's memory, and the stream's own description of its devices.
"""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream.elements import (
    Delta,
    Element,
    Opaque,
    PageRun,
    RamSetup,
    ZeroRun,
)
from nova_dmigrate.stream.reader import StreamParser
from nova_dmigrate.stream.writer import StreamWriter
from tools.corpus.variants import BY_NAME, Variant

# Enough for a record and whatever may follow it: how far a window reaches behind a split.
LOOK_AHEAD = 2 * fmt.PAGE_RECORD_SIZE + 512
# An element up to this size is split at every position, a longer one at chosen ones.
SHORT = 300
RUNS_PER_STREAM = 10
RANDOM_SPLITS = 6

Records = list[tuple[Any, ...]]


class Recorded(NamedTuple):
    """A stream and what is known of it."""

    name: str
    stream: bytes
    facts: dict[str, Any]

    @property
    def variant(self) -> Variant:
        return BY_NAME[self.name]

    @property
    def reason(self) -> str:
        """Why parsing it must end."""
        return str(getattr(fmt, self.variant.reason))


class Relay:
    """Reader and writer back to back; ``feed`` returns what was read and what was written."""

    def __init__(self) -> None:
        self.parser = StreamParser()
        self.writer: StreamWriter | None = None
        self.pending = b""

    def feed(self, data: bytes | memoryview) -> tuple[list[Element], bytes]:
        given = memoryview(self.pending + data if self.pending else data)
        elements, used = self.parser.parse(given)
        self.pending = bytes(given[used:])
        return elements, b"".join(self._written(elements))

    def _written(self, elements: Iterable[Element]) -> Iterator[Any]:
        for element in elements:
            if self.writer is None:
                if isinstance(element, RamSetup):
                    assert self.parser.has_footers is not None
                    self.writer = StreamWriter(element, self.parser.has_footers)
                yield element.data
            else:
                yield from self.writer.write(element)

    def advance(self, data: memoryview) -> None:
        """Take in one element. With the byte behind it, for which RAM's setup waits."""
        self.feed(data)
        self.pending = b""

    def fork(self) -> "Relay":
        """A relay in the same state. Both keep only immutable values, but for tables of setup."""
        other = copy.copy(self)
        other.parser = copy.copy(self.parser)
        other.writer = copy.copy(self.writer)
        return other


def records(elements: Iterable[Element]) -> Records:
    """Elements without the accident of where a run or an opaque piece was cut."""
    found: Records = []
    for element in elements:
        kind = type(element).__name__
        if isinstance(element, PageRun | ZeroRun):
            found += [(kind, element.block, offset) for offset in element.offsets.tolist()]
        elif isinstance(element, Delta):
            found.append((kind, element.block, element.offset))
        elif isinstance(element, Opaque):
            if not (found and found[-1][0] == kind):
                found.append((kind, element.reason))
        else:
            found.append((kind, bytes(element.data)))
    return found


def check_pieces(recorded: Recorded, cuts: Iterable[int]) -> None:
    """Fed piece by piece, the stream is written as it was, and read as it is in one piece."""
    stream = memoryview(recorded.stream)
    relay, start, written, elements = Relay(), 0, 0, []
    for end in [*cuts, len(stream)]:
        found, out = relay.feed(stream[start:end])
        assert out == stream[written : written + len(out)], f"byte {written} and on"
        elements += found
        start, written = end, written + len(out)
    assert written == len(stream), f"{len(stream) - written} bytes are not written"
    assert records(elements) == records(Relay().feed(stream)[0])
    relay.parser.finish()


def check_truncated(recorded: Recorded, length: int) -> None:
    """Of a stream that ends early what is whole is written, and the end is told as one."""
    stream = memoryview(recorded.stream)[:length]
    relay = Relay()
    _, out = relay.feed(stream)
    assert out + relay.pending == stream
    assert len(relay.pending) < fmt.MAX_ELEMENT
    try:
        relay.parser.finish()
    except exception.StreamError:
        assert relay.parser.opaque_reason is None
    else:
        assert relay.parser.opaque_reason == recorded.reason


def check_every_split(recorded: Recorded) -> int:
    """Split around every element, and within: at every byte of short ones, chosen ones of runs.

    Only a window around each split is read again, by reader and writer as they were before the
    element. Returns the number of splits.
    """
    chosen = random.Random(recorded.name)
    stream = memoryview(recorded.stream)
    whole, _ = Relay().feed(stream)
    runs = [n for n, element in enumerate(whole) if isinstance(element, PageRun | ZeroRun)]
    kept = set(chosen.sample(runs, min(RUNS_PER_STREAM, len(runs)))) | set(runs[:2])
    relay, start, splits = Relay(), 0, 0
    for number, element in enumerate(whole):
        end = start + len(element.data)
        if number not in runs or number in kept:
            splits += _check_splits(relay, stream, start, end, _positions(start, end, chosen))
        relay.advance(stream[start : end + 1])
        start = end
    assert relay.parser.opaque_reason == recorded.reason
    return splits


def check_all_splits(recorded: Recorded) -> int:
    """Split at every position of the part of the stream that is parsed."""
    stream = memoryview(recorded.stream)
    relay, start, splits = Relay(), 0, 0
    for element in Relay().feed(stream)[0]:
        end = start + min(len(element.data), SHORT if isinstance(element, Opaque) else len(stream))
        splits += _check_splits(relay, stream, start, end, range(start, end))
        relay.advance(stream[start : end + 1])
        start = end
    assert relay.parser.opaque_reason == recorded.reason
    return splits


def _positions(start: int, end: int, chosen: random.Random) -> Iterable[int]:
    if end - start <= SHORT:
        return range(start, end + 3)
    around = {start, end, start + fmt.ZERO_RECORD_SIZE, start + fmt.PAGE_RECORD_SIZE}
    found = {position + distance for position in around for distance in range(-3, 4)}
    found |= {chosen.randrange(start, end) for _ in range(RANDOM_SPLITS)}
    return sorted(position for position in found if start <= position <= end + 3)


def _check_splits(
    relay: Relay, stream: memoryview, start: int, end: int, positions: Iterable[int]
) -> int:
    """Read the window from ``start`` on in one piece and in two, for each position."""
    window = stream[start : end + LOOK_AHEAD]
    reference = relay.fork()
    expected, expected_out = reference.feed(window)
    expected_records = records(expected)
    count = 0
    for position in positions:
        split = relay.fork()
        first, out_first = split.feed(window[: position - start])
        second, out_second = split.feed(window[position - start :])
        assert out_first + out_second == expected_out, f"split at {position}"
        assert records([*first, *second]) == expected_records, f"split at {position}"
        assert split.pending == reference.pending, f"split at {position}"
        count += 1
    return count


def check_facts(recorded: Recorded) -> None:
    """What was read is what QEMU says that it sent."""
    facts, statistics = recorded.facts, recorded.facts["statistics"]
    relay = Relay()
    elements, _ = relay.feed(recorded.stream)
    parser = relay.parser
    assert parser.opaque_reason == recorded.reason, f"{parser.opaque_reason}"
    assert parser.return_path == bool({"return-path", "postcopy-ram"} & set(facts["capabilities"]))
    # QEMU sends the configuration section and footers for machine types from 2.4 on.
    old = _type_version(facts["machine"]) < (2, 4)
    if recorded.variant.reason != "UNKNOWN_CAPABILITY":
        assert parser.machine == (None if old else facts["machine"])
    if parser.blocks:
        assert parser.has_footers == (not old)
        found = {block.idstr: block.used_length for block in parser.blocks}
        assert found == {name: block["length"] for name, block in facts["blocks"].items()}
        assert parser.total_ram == sum(found.values())
    if recorded.reason != fmt.RAM_COMPLETE:
        return
    counted = {
        "pages": sum(len(each.offsets) for each in elements if isinstance(each, PageRun)),
        "zeros": sum(len(each.offsets) for each in elements if isinstance(each, ZeroRun)),
        "delta_bytes": sum(len(each.data) - 8 for each in elements if isinstance(each, Delta)),
    }
    expected = {name: statistics[name] for name in counted}
    if facts["channels"] > 1:
        expected["pages"] = 0
    assert counted == expected, f"{counted} instead of {expected}"


def check_contents(recorded: Recorded) -> None:
    """The pages, zeros and deltas put together are the memory of QEMU's destination."""
    elements, _ = Relay().feed(recorded.stream)
    (setup,) = (element for element in elements if isinstance(element, RamSetup))
    memory = [
        np.zeros((block.used_length // fmt.PAGE_SIZE, fmt.PAGE_SIZE), np.uint8)
        for block in setup.blocks
    ]
    for element in elements:
        if isinstance(element, PageRun):
            memory[element.block][element.offsets // fmt.PAGE_SIZE] = element.pages
        elif isinstance(element, ZeroRun):
            memory[element.block][element.offsets // fmt.PAGE_SIZE] = element.fill[:, np.newaxis]
        elif isinstance(element, Delta):
            page = memory[element.block][element.offset // fmt.PAGE_SIZE]
            _apply_delta(page, bytes(element.data[element.head + 3 :]))
    found = {
        block.idstr: hashlib.sha256(memory[index]).hexdigest()
        for index, block in enumerate(setup.blocks)
        if block.idstr in recorded.facts["contents"]
    }
    assert found == recorded.facts["contents"], f"{found}"


def _apply_delta(page: np.ndarray[Any, np.dtype[np.uint8]], delta: bytes) -> None:
    """XBZRLE: alternately the lengths (ULEB128) of an unchanged and of a changed run, its bytes."""
    source = target = 0
    changed = False
    while source < len(delta):
        length = shift = 0
        while True:
            byte = delta[source]
            source += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        if changed:
            page[target : target + length] = np.frombuffer(delta, np.uint8, length, source)
            source += length
        target += length
        changed = not changed


def check_tail(recorded: Recorded) -> None:
    """Behind RAM come the devices, in the order of QEMU's own description at the stream's end."""
    elements, _ = Relay().feed(recorded.stream)
    tail = b"".join(element.data for element in elements if isinstance(element, Opaque))
    section, length = tail[0], tail[5]
    name, instance = tail[6 : 6 + length].decode(), struct.unpack_from(">I", tail, 6 + length)[0]
    assert section == fmt.Section.FULL, f"section type {section}"
    # Types up to 2.2 send no description.
    if _type_version(recorded.facts["machine"]) >= (2, 3):
        first = _description(tail)["devices"][0]
        assert (name, instance) == (first["name"], first["instance_id"]), f"{name} {first}"


def _description(tail: bytes) -> dict[str, Any]:
    mark = len(tail)
    while (mark := tail.rfind(b"\x00\x06", 0, mark)) >= 0:
        (length,) = struct.unpack_from(">I", tail, mark + 2)
        if mark + 6 + length == len(tail):
            found: dict[str, Any] = json.loads(tail[mark + 6 :])
            return found
    raise AssertionError("the stream does not end with its description")


def _type_version(machine: str) -> tuple[int, ...]:
    return tuple(int(part) for part in machine.rsplit("-", 1)[1].split("."))

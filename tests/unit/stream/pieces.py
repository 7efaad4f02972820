# SPDX-License-Identifier: Apache-2.0
"""Feeds a parser in pieces as a socket would, and brings what it found into comparable form."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from nova_dmigrate.stream import elements as el
from nova_dmigrate.stream.format import MAX_ELEMENT
from nova_dmigrate.stream.reader import StreamParser
from nova_dmigrate.stream.writer import StreamWriter
from tests.unit.stream.walk import Record


class Parsed(NamedTuple):
    """A parser at the end of its input."""

    parser: StreamParser
    elements: list[el.Element]
    rest: bytes


def parse(raw: bytes, sizes: Iterable[int] = ()) -> Parsed:
    """Parse in pieces of the given sizes, then what is left in one; check what must always hold.

    Each call gets a copy of its own, so that nothing can refer to bytes of another call.
    """
    parser = StreamParser()
    found: list[el.Element] = []
    rest = b""
    start = 0
    for size in chain(sizes, repeat(len(raw))):
        piece = raw[start : start + size]
        start += len(piece)
        window = rest + piece
        elements, consumed = parser.parse(memoryview(window))
        assert sum(len(element.data) for element in elements) == consumed <= len(window)
        assert all(len(element.data) for element in elements)
        rest = window[consumed:]
        assert len(rest) < MAX_ELEMENT
        assert parser.position == start - len(rest)
        assert not (rest and parser.opaque_reason)
        found += elements
        if start >= len(raw):
            break
    assert joined(found) + rest == raw
    return Parsed(parser, found, rest)


def joined(elements: Iterable[el.Element]) -> bytes:
    return b"".join(element.data for element in elements)


def written(parsed: Parsed) -> bytes:
    """The elements through a writer, as a relay with nothing to do would emit them."""
    writer: StreamWriter | None = None
    out: list[el.Buffer] = []
    for element in parsed.elements:
        if writer is not None:
            out += writer.write(element)
            continue
        out.append(element.data)
        if isinstance(element, el.RamSetup):
            assert parsed.parser.has_footers is not None
            writer = StreamWriter(element, parsed.parser.has_footers)
    return b"".join(out)


def record_list(parsed: Parsed) -> list[Record]:
    """All RAM records one by one, from the arrays (not from ``data``)."""
    names = [block.idstr for block in parsed.parser.blocks]
    found: list[Record] = []
    for element in parsed.elements:
        if isinstance(element, el.PageRun):
            for offset, page in zip(element.offsets, element.pages, strict=True):
                found.append(Record("page", names[element.block], int(offset), page.tobytes()))
        elif isinstance(element, el.ZeroRun):
            for offset, fill in zip(element.offsets, element.fill, strict=True):
                found.append(Record("zero", names[element.block], int(offset), bytes([fill])))
        elif isinstance(element, el.Delta):
            payload = bytes(element.data[element.head + 3 :])
            found.append(Record("delta", names[element.block], element.offset, payload))
    return found


def skeleton(elements: Sequence[el.Element]) -> list[tuple[object, ...]]:
    """All but the records, opaque bytes joined: what must not depend on how a stream is split."""
    shape: list[tuple[object, ...]] = []
    for element in elements:
        if isinstance(element, el.Verbatim):
            shape.append(("verbatim", element.what, bytes(element.data)))
        elif isinstance(element, el.RamSetup):
            shape.append(("setup", element.section_id, element.total, element.blocks))
        elif isinstance(element, (el.SectionStart, el.SectionFinish)):
            shape.append((type(element).__name__, element.section_id, element.end))
        elif isinstance(element, el.Opaque):
            before = shape.pop()[2] if shape and shape[-1][0] == "opaque" else b""
            shape.append(("opaque", element.reason, before + bytes(element.data)))  # type: ignore[operator]
    return shape

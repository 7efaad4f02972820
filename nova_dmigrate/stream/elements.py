# SPDX-License-Identifier: Apache-2.0
"""What a migration stream is made of.

Every element keeps its verbatim bytes in ``data``, a view into the buffer that was parsed: the
``data`` of all elements, one after the other, are the input. Whoever keeps an element keeps that
buffer. Arrays are views into the same buffer unless said otherwise.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Offsets: TypeAlias = NDArray[np.uint64]
Bytes: TypeAlias = NDArray[np.uint8]
Buffer: TypeAlias = bytes | memoryview | Bytes  # what sendmsg takes


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One of QEMU's RAMBlocks, as the setup of RAM lists it."""

    idstr: str
    used_length: int  # bytes, a multiple of 4 KiB
    page_size: int | None = None  # bytes; None where the stream does not say


@dataclass(frozen=True, slots=True, eq=False)
class Element:
    """The base of all: some whole piece of the stream."""

    data: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class Verbatim(Element):
    """Known, and the same wherever it stands: header, configuration, commands, setup's footer."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class RamSetup(Element):
    """RAM's START section with the list of RAMBlocks, without its footer."""

    section_id: int
    total: int  # bytes: the sum of the blocks' used lengths
    blocks: tuple[RamBlock, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SectionStart(Element):
    """The five bytes with which a PART or the END of RAM begins."""

    section_id: int
    end: bool


@dataclass(frozen=True, slots=True, eq=False)
class SectionFinish(Element):
    """The EOS record of a PART or END, with the section's footer if the machine type has any."""

    section_id: int
    end: bool
    has_footer: bool


@dataclass(frozen=True, slots=True, eq=False)
class PageRun(Element):
    """Full pages of one RAMBlock, one record after the other.

    The first record's header takes ``head`` bytes: 8 if it continues the block of the record
    before it, more if it names its block. All later records are CONTINUE records, so page i is
    at ``data[head + 4104 * i:]``.
    """

    block: int  # index into RamSetup.blocks
    offsets: Offsets  # (n,), bytes from the block's start; an array of its own
    pages: Bytes  # (n, 4096), strides (4104, 1)
    head: int


@dataclass(frozen=True, slots=True, eq=False)
class ZeroRun(Element):
    """Pages filled with one byte (zero in practice); like PageRun, with a stride of 9."""

    block: int
    offsets: Offsets  # (n,), bytes from the block's start; an array of its own
    fill: Bytes  # (n,), strides (9,)
    head: int


@dataclass(frozen=True, slots=True, eq=False)
class Delta(Element):
    """One XBZRLE record: a difference to what the destination's page holds at that moment."""

    block: int
    offset: int
    head: int


@dataclass(frozen=True, slots=True, eq=False)
class Opaque(Element):
    """Bytes behind the point where parsing ended, for ``reason`` (see ``format``)."""

    reason: str

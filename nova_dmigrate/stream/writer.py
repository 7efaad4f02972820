# SPDX-License-Identifier: Apache-2.0
"""The writer: emits a migration stream, with sections and a CONTINUE state of its own.

QEMU's loader keeps the last record's block across sections, so whoever drops, adds or reorders
records has to know what it was told. All methods return lists of buffers, ready for sendmsg, in
the order in which they are to be sent; page data is never copied.
"""

from typing import Final

from nova_dmigrate import exception
from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream.elements import (
    Buffer,
    Delta,
    Element,
    Opaque,
    PageRun,
    RamSetup,
    SectionFinish,
    SectionStart,
    ZeroRun,
)
from nova_dmigrate.stream.format import Section

_CONTINUE_BYTE: Final = fmt.RECORD_HEADER_SIZE - 1


class StreamWriter:
    """Emits what comes behind RAM's setup.

    Attributes, to be read only:

    - ``section_open``: whether a PART or END is open
    - ``end_open``: whether that is the END
    - ``last_block``: index of the block to which a CONTINUE record would refer; None at first
    """

    def __init__(self, setup: RamSetup, has_footers: bool) -> None:
        """:param setup: RAM's setup as the reader found it; it has been sent already."""
        self.section_open = False
        self.end_open = False
        self.last_block: int | None = None
        section = fmt.U32.pack(setup.section_id)
        self._part = bytes((Section.PART,)) + section
        self._end = bytes((Section.END,)) + section
        self._finish = fmt.EOS_RECORD
        if has_footers:
            self._finish += bytes((Section.FOOTER,)) + section
        names = [block.idstr.encode() for block in setup.blocks]
        self._names = tuple(bytes((len(name),)) + name for name in names)

    # Sections

    def verbatim(self, data: Buffer) -> list[Buffer]:
        """Bytes that stand between sections: an open section is finished first."""
        return [*self.close(), data]

    def open_part(self) -> list[Buffer]:
        """Begin a PART; nothing if a section is open."""
        if self.section_open:
            return []
        self.section_open = True
        return [self._part]

    def open_end(self) -> list[Buffer]:
        """Begin RAM's END, behind the end of an open PART; nothing if the END is open."""
        if self.end_open:
            return []
        before = self.close()
        self.section_open = self.end_open = True
        return [*before, self._end]

    def close(self) -> list[Buffer]:
        """Finish the open PART or END; nothing if none is open."""
        if not self.section_open:
            return []
        self.section_open = self.end_open = False
        return [self._finish]

    # Records

    def page_records(self, block: int, records: Buffer) -> list[Buffer]:
        """Full pages of one block, in a PART if no section is open.

        :param block: index into the setup's blocks
        :param records: contiguous CONTINUE records of 4104 bytes each, also the first one
        :raises StreamError: when that cannot be, from the size
        """
        return self._uniform(block, records, fmt.PAGE_RECORD_SIZE)

    def zero_records(self, block: int, records: Buffer) -> list[Buffer]:
        """Zero pages: as ``page_records``, of 9 bytes each."""
        return self._uniform(block, records, fmt.ZERO_RECORD_SIZE)

    def delta(self, block: int, data: Buffer, head: int) -> list[Buffer]:
        """One XBZRLE record as it was read: ``head`` bytes of header, then the delta."""
        return self._as_read(block, data, head)

    def write(self, element: Element) -> list[Buffer]:
        """An element as it was read.

        All elements behind the setup, written in their order by a new writer, give the bytes
        that were read.

        :raises StreamError: for the start or finish of a section that does not fit to what is
            open here
        """
        if isinstance(element, (PageRun, ZeroRun, Delta)):
            return self._as_read(element.block, element.data, element.head)
        if isinstance(element, SectionStart):
            if self.section_open:
                raise exception.StreamError(reason="a section begins within a section")
            self.section_open = True
            self.end_open = element.end
            return [element.data]
        if isinstance(element, SectionFinish):
            if not self.section_open or self.end_open != element.end:
                raise exception.StreamError(reason="a section ends that did not begin")
            self.section_open = self.end_open = False
            return [element.data]
        if isinstance(element, Opaque):
            # It may begin within a section. Its bytes go on exactly where the reader was.
            return [element.data]
        return self.verbatim(element.data)

    def _uniform(self, block: int, records: Buffer, stride: int) -> list[Buffer]:
        view = memoryview(records).cast("B")
        if not len(view) or len(view) % stride:
            raise exception.StreamError(
                reason=f"{len(view)} bytes are no records of {stride} bytes each"
            )
        return self._as_read(block, view, fmt.RECORD_HEADER_SIZE)

    def _as_read(self, block: int, data: Buffer, head: int) -> list[Buffer]:
        """Records whose first header has ``head`` bytes, naming the block where that is due."""
        buffers = self.open_part()
        if head == fmt.RECORD_HEADER_SIZE and block != self.last_block:
            view = memoryview(data).cast("B")
            header = bytearray(view[: fmt.RECORD_HEADER_SIZE])
            header[_CONTINUE_BYTE] &= ~fmt.CONTINUE & 0xFF
            buffers.append(bytes(header) + self._names[block])
            buffers.append(view[fmt.RECORD_HEADER_SIZE :])
        else:
            buffers.append(data)
        self.last_block = block
        return buffers

# SPDX-License-Identifier: Apache-2.0
"""The reader: cuts a migration stream into elements, incrementally and without I/O.

It never guesses. Whatever is not known for certain ends the parsing for good: from there on all
bytes are ``Opaque``. It never searches for a place to go on either, because the bytes of devices
and pages are under the guest's influence.
"""

import logging
from typing import Final, NoReturn

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream import sections
from nova_dmigrate.stream.elements import (
    Delta,
    Element,
    Opaque,
    PageRun,
    RamBlock,
    RamSetup,
    SectionFinish,
    SectionStart,
    Verbatim,
    ZeroRun,
)
from nova_dmigrate.stream.format import Command, Section
from nova_dmigrate.stream.records import PAGE_CONTINUE, ZERO_CONTINUE, run_offsets
from nova_dmigrate.stream.sections import Cursor, Incomplete, Uncertain

LOG = logging.getLogger(__name__)

_UINT8: Final = np.dtype(np.uint8)
_PAGE_STRIDES: Final = (fmt.PAGE_RECORD_SIZE, 1)
_ZERO_STRIDES: Final = (fmt.ZERO_RECORD_SIZE,)
_HEADER_AT: Final = fmt.U64.unpack_from

# Records that end the parsing, each with a reason of its own.
_REFUSED_FLAGS: Final = (
    (fmt.MULTIFD_FLUSH, fmt.MULTIFD_SEEN),
    (fmt.COMPRESS_PAGE, fmt.COMPRESSION_SEEN),
    (fmt.HOOK, fmt.HOOK_SEEN),
)


class StreamParser:
    """One migration stream, from its first byte.

    Attributes, all of them to be read only:

    - ``blocks``: the RAMBlocks; empty until RAM's setup has been read
    - ``section_id``: of RAM; None until then
    - ``has_footers``: whether sections have footers; None until then
    - ``machine``: the machine type's name; None where the stream has no configuration section
    - ``total_ram``: bytes of all RAMBlocks
    - ``return_path``, ``post_copy_advised``: whether the command for it was seen
    - ``in_ram_section``: whether a PART or END of RAM is open at the current position
    - ``last_block``: index of the block that a CONTINUE record would refer to; None at first
    - ``position``: bytes consumed so far
    - ``opaque_reason``: why parsing has ended, None as long as it has not
    - ``opaque_detail``, ``opaque_position``: what was met, and where in the stream
    """

    def __init__(self) -> None:
        self.blocks: tuple[RamBlock, ...] = ()
        self.section_id: int | None = None
        self.has_footers: bool | None = None
        self.machine: str | None = None
        self.total_ram = 0
        self.return_path = False
        self.post_copy_advised = False
        self.in_ram_section = False
        self.last_block: int | None = None
        self.position = 0
        self.opaque_reason: str | None = None
        self.opaque_detail = ""
        self.opaque_position: int | None = None
        self._rest = 0
        self._end_section = False
        self._footer_due = False
        self._footer = b""
        self._header_read = False
        self._configured = False
        self._names: dict[bytes, int] = {}
        self._lengths: tuple[int, ...] = ()

    @property
    def post_copy_possible(self) -> bool:
        """Whether QEMU may begin post-copy: it has said so, or parsing had ended before it could
        have."""
        ended_early = self.opaque_reason is not None and self.section_id is None
        return self.post_copy_advised or ended_early

    def parse(self, data: memoryview) -> tuple[list[Element], int]:
        """Cut ``data`` into elements.

        Never raises on content. Elements are views into ``data``, which must stay as it is for
        as long as they are used.

        :param data: contiguous bytes: what the last call did not consume, and more
        :returns: the whole elements in it, and how many bytes they take; the rest, always less
            than MAX_ELEMENT, is the caller's to present again. Once the parsing has ended,
            everything is consumed.
        """
        found: list[Element] = []
        position = 0
        end = len(data)
        try:
            while position < end and self.opaque_reason is None:
                if self.in_ram_section:
                    position = self._read_records(data, position, end, found)
                    if self.in_ram_section:
                        break
                else:
                    position = self._read_section(data, position, found)
        except Incomplete:
            # Elements that were found before say where the incomplete one begins.
            position = sum(len(element.data) for element in found)
        except Uncertain as error:
            position = sum(len(element.data) for element in found)
            self._latch(error.reason, error.detail, position)
        if self.opaque_reason is not None and position < end:
            found.append(Opaque(data[position:], self.opaque_reason))
            position = end
        self.position += position
        self._rest = end - position
        return found, position

    def finish(self) -> None:
        """Say that the stream has ended.

        :raises StreamError: when it ended within an element or before RAM was complete. Where
            parsing has ended before there is nothing to be known about the end.
        """
        if self.opaque_reason is not None:
            return
        if self._rest:
            reason = f"it ended within an element, at byte {self.position + self._rest}"
        else:
            reason = f"it ended before RAM was complete, at byte {self.position}"
        raise exception.StreamError(reason=reason)

    def _latch(self, reason: str, detail: str, position: int) -> None:
        self.opaque_reason = reason
        self.opaque_detail = detail
        self.opaque_position = self.position + position
        if reason != fmt.RAM_COMPLETE:
            LOG.info(
                "The migration stream is not parsed from byte %d on: %s%s",
                self.opaque_position,
                reason,
                f" ({detail})" if detail else "",
            )

    # Sections

    def _read_section(self, data: memoryview, position: int, found: list[Element]) -> int:
        """Read what begins on the level of sections; return the position behind it."""
        if not self._header_read:
            return self._read_header(data, position, found)
        if self._footer_due:
            return self._read_setup_footer(data, position, found)
        kind = data[position]
        cursor = Cursor(data, position)
        if kind in (Section.PART, Section.END):
            return self._read_section_start(cursor, kind == Section.END, found)
        if kind == Section.COMMAND:
            what = self._read_command(cursor)
        elif kind == Section.START:
            return self._read_ram_setup(cursor, found)
        elif kind == Section.CONFIGURATION and not self._configured and self.section_id is None:
            self.machine = sections.read_configuration(cursor)
            self._configured = True
            what = "configuration"
        elif kind == Section.FULL:
            raise Uncertain(fmt.FULL_BEFORE_RAM)
        else:
            raise Uncertain(fmt.UNKNOWN_SECTION, f"type {kind:#04x}")
        found.append(Verbatim(data[position : cursor.position], what))
        return cursor.position

    def _read_header(self, data: memoryview, position: int, found: list[Element]) -> int:
        end = position + len(fmt.HEADER)
        header = data[position:end]
        if header != fmt.HEADER[: len(header)]:
            raise Uncertain(fmt.NOT_A_STREAM, f"{bytes(header)!r}")
        if len(header) < len(fmt.HEADER):
            raise Incomplete
        self._header_read = True
        found.append(Verbatim(header, "header"))
        return end

    def _read_command(self, cursor: Cursor) -> str:
        command, what = sections.read_command(cursor)
        if command == Command.OPEN_RETURN_PATH:
            self.return_path = True
        elif command == Command.POSTCOPY_ADVISE:
            if self.section_id is not None:
                raise Uncertain(fmt.UNKNOWN_COMMAND, f"{what} behind RAM's setup")
            self.post_copy_advised = True
        return what

    def _read_ram_setup(self, cursor: Cursor, found: list[Element]) -> int:
        start = cursor.position
        if self.section_id is not None:
            raise Uncertain(fmt.UNKNOWN_ITERABLE, "a second START section")
        setup = sections.read_ram_setup(cursor)
        # Whether there are footers is seen in the byte behind; wait for it, so that whoever gets
        # the setup knows that, too. QEMU always has more to say here.
        end = cursor.position
        self.has_footers = cursor.u8() == Section.FOOTER
        self._footer_due = self.has_footers
        self.section_id, self.total_ram, self.blocks = setup
        if self.has_footers:
            self._footer = bytes((Section.FOOTER,)) + fmt.U32.pack(self.section_id)
        self._names = {block.idstr.encode(): index for index, block in enumerate(self.blocks)}
        self._lengths = tuple(block.used_length for block in self.blocks)
        found.append(RamSetup(cursor.data[start:end], *setup))
        return end

    def _read_setup_footer(self, data: memoryview, position: int, found: list[Element]) -> int:
        footer = data[position : position + fmt.FOOTER_SIZE]
        if footer != self._footer[: len(footer)]:
            raise Uncertain(fmt.UNKNOWN_FOOTER, f"{bytes(footer)!r}")
        if len(footer) < fmt.FOOTER_SIZE:
            raise Incomplete
        self._footer_due = False
        found.append(Verbatim(footer, "footer"))
        return position + fmt.FOOTER_SIZE

    def _read_section_start(self, cursor: Cursor, end: bool, found: list[Element]) -> int:
        start = cursor.position
        cursor.take(1)
        section_id = cursor.u32()
        if section_id != self.section_id:
            raise Uncertain(fmt.UNKNOWN_SECTION, f"PART or END of section {section_id}")
        self.in_ram_section = True
        self._end_section = end
        found.append(SectionStart(cursor.data[start : cursor.position], section_id, end))
        return cursor.position

    # RAM records: the hot path. No copies, no exceptions and few calls per run.

    def _read_records(self, data: memoryview, position: int, end: int, found: list[Element]) -> int:
        """Read records up to the section's end; return the position behind the last whole one."""
        last = self.last_block
        lengths = self._lengths
        while end - position >= fmt.RECORD_HEADER_SIZE:
            (header,) = _HEADER_AT(data, position)
            flags = header & fmt.FLAGS
            if flags & fmt.CONTINUE:
                block = last
                head = fmt.RECORD_HEADER_SIZE
            elif flags == fmt.EOS:
                return self._read_section_finish(data, position, end, header, found)
            else:
                if flags not in (fmt.PAGE, fmt.ZERO, fmt.XBZRLE):
                    self._refuse_record(header)
                name_at = position + fmt.RECORD_HEADER_SIZE + 1
                if name_at > end:
                    break
                name_end = name_at + data[name_at - 1]
                if name_end > end:
                    break
                block = self._names.get(bytes(data[name_at:name_end]))
                head = name_end - position
                flags |= fmt.CONTINUE
            offset = header & ~fmt.FLAGS

            if flags == PAGE_CONTINUE:
                stride = fmt.PAGE_RECORD_SIZE
            elif flags == ZERO_CONTINUE:
                stride = fmt.ZERO_RECORD_SIZE
            elif flags == fmt.XBZRLE | fmt.CONTINUE:
                stride = 0
            else:
                self._refuse_record(header)
            if block is None:
                raise Uncertain(fmt.UNKNOWN_BLOCK, f"header {header:#x}")
            used_length = lengths[block]
            if offset >= used_length:
                raise Uncertain(fmt.OFFSET_BEYOND_BLOCK, f"header {header:#x}")

            if not stride:
                delta_end = self._delta_end(data, position + head, end)
                if not delta_end:
                    break
                found.append(Delta(data[position:delta_end], block, offset, head))
                position = delta_end
                self.last_block = last = block
                continue
            start = position + head - fmt.RECORD_HEADER_SIZE
            limit = (end - start) // stride
            if limit < 1:
                break
            offsets = run_offsets(data, start, limit, stride, flags, offset, used_length)
            count = len(offsets)
            run_end = start + count * stride
            run = data[position:run_end]
            payload = start + fmt.RECORD_HEADER_SIZE
            if stride == fmt.PAGE_RECORD_SIZE:
                pages = np.ndarray((count, fmt.PAGE_SIZE), _UINT8, data, payload, _PAGE_STRIDES)
                found.append(PageRun(run, block, offsets, pages, head))
            else:
                fill = np.ndarray((count,), _UINT8, data, payload, _ZERO_STRIDES)
                found.append(ZeroRun(run, block, offsets, fill, head))
            position = run_end
            self.last_block = last = block
        return position

    def _read_section_finish(
        self, data: memoryview, position: int, end: int, header: int, found: list[Element]
    ) -> int:
        """Read EOS and the footer; return the position behind, or the same if incomplete."""
        if header != fmt.EOS:
            raise Uncertain(fmt.UNKNOWN_RECORD, f"header {header:#x}")
        footer_at = position + fmt.RECORD_HEADER_SIZE
        finish = min(footer_at + len(self._footer), end)
        footer = data[footer_at:finish]
        if footer != self._footer[: len(footer)]:
            raise Uncertain(fmt.UNKNOWN_FOOTER, f"{bytes(footer)!r}")
        if len(footer) < len(self._footer):
            return position
        assert self.section_id is not None
        self.in_ram_section = False
        found.append(
            SectionFinish(
                data[position:finish], self.section_id, self._end_section, bool(self._footer)
            )
        )
        if self._end_section:
            self._latch(fmt.RAM_COMPLETE, "", finish)
        return finish

    @staticmethod
    def _delta_end(data: memoryview, position: int, end: int) -> int:
        """Where the XBZRLE record ends whose payload begins at ``position``; 0 if incomplete."""
        payload = position + 3
        if payload > end:
            return 0
        length: int = fmt.U16.unpack_from(data, position + 1)[0]
        if data[position] != fmt.XBZRLE_ENCODING or length > fmt.PAGE_SIZE:
            raise Uncertain(fmt.DELTA_MALFORMED, f"{bytes(data[position:payload])!r}")
        return payload + length if payload + length <= end else 0

    @staticmethod
    def _refuse_record(header: int) -> NoReturn:
        for flag, reason in _REFUSED_FLAGS:
            if header & flag:
                raise Uncertain(reason, f"header {header:#x}")
        raise Uncertain(fmt.UNKNOWN_RECORD, f"header {header:#x}")

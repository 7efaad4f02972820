# SPDX-License-Identifier: Apache-2.0
"""Everything of the stream that is small and comes once: configuration, commands, RAM's setup.

These functions read one element from its first byte on. ``Cursor`` raises ``Incomplete`` when the
buffer ends too early, and they raise ``Uncertain`` for whatever they do not know for certain;
both stay within this package.
"""

from typing import Final, NamedTuple

from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream.elements import RamBlock
from nova_dmigrate.stream.format import Command, Section

_CAPABILITIES: Final = b"configuration/capabilities"
_UUID: Final = b"configuration/uuid"
_PAGE_BITS: Final = b"configuration/target-page-bits"
_UUID_SIZE: Final = 16
# A switch to post-copy begins with RAM_DISCARD; the others follow it, packaged.
_POSTCOPY: Final = (
    Command.POSTCOPY_RAM_DISCARD,
    Command.PACKAGED,
    Command.POSTCOPY_LISTEN,
    Command.POSTCOPY_RUN,
)


class Incomplete(Exception):
    """The buffer ends within the element."""


class Uncertain(Exception):
    """The element is not known for certain; ``reason`` is one of ``format``'s."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Cursor:
    """Reads integers and strings from a buffer, at ``position``, which moves on."""

    __slots__ = ("data", "end", "limit", "position")

    def __init__(self, data: memoryview, position: int) -> None:
        self.data = data
        self.position = position
        self.end = len(data)
        self.limit = position + fmt.MAX_ELEMENT

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes, as a copy.

        :raises Incomplete: when the buffer ends before
        :raises Uncertain: when the element would become longer than MAX_ELEMENT, however much
            of it is in the buffer: how the stream was split must not matter
        """
        start = self.position
        end = start + size
        if end > self.limit:
            raise Uncertain(fmt.ELEMENT_TOO_LONG, f"{size} bytes more")
        if end > self.end:
            raise Incomplete
        self.position = end
        return bytes(self.data[start:end])

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        value: int = fmt.U16.unpack(self.take(2))[0]
        return value

    def u32(self) -> int:
        value: int = fmt.U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = fmt.U64.unpack(self.take(8))[0]
        return value

    def counted(self) -> bytes:
        """A string behind its length in one byte."""
        return self.take(self.u8())


class CommandFacts(NamedTuple):
    """A COMMAND that changes nothing about how the stream is to be read."""

    command: Command
    what: str


def read_configuration(cursor: Cursor) -> str:
    """Read the configuration section and return the machine type's name.

    The section does not say whether subsections follow; but the byte of a subsection begins
    nothing else on the level of sections, so the byte behind tells.
    """
    cursor.take(1)
    machine = _printable(cursor.take(cursor.u32()), fmt.UNKNOWN_CONFIGURATION)
    while True:
        following = cursor.position
        if cursor.u8() != Section.SUBSECTION:
            cursor.position = following
            return machine
        _read_subsection(cursor)


def _read_subsection(cursor: Cursor) -> None:
    name = cursor.counted()
    version = cursor.u32()
    if version != 1:
        raise Uncertain(fmt.UNKNOWN_CONFIGURATION, f"{name!r} has version {version}")
    if name == _UUID:
        cursor.take(_UUID_SIZE)
    elif name == _PAGE_BITS:
        bits = cursor.u32()
        if bits != fmt.PAGE_BITS:
            raise Uncertain(fmt.UNKNOWN_CONFIGURATION, f"pages of {bits} bits")
    elif name == _CAPABILITIES:
        # QEMU lists here only the capabilities that alter the stream itself.
        if cursor.u32():
            raise Uncertain(fmt.UNKNOWN_CAPABILITY, repr(cursor.counted()))
    else:
        raise Uncertain(fmt.UNKNOWN_CONFIGURATION, f"subsection {name!r}")


def read_command(cursor: Cursor) -> CommandFacts:
    """Read a COMMAND.

    :raises Uncertain: unless it is one of the few that leave the stream's form alone
    """
    cursor.take(1)
    number = cursor.u16()
    length = cursor.u16()
    detail = f"command {number} with {length} bytes"
    if number == Command.POSTCOPY_ADVISE:
        if length:
            _check_advice(cursor, length, detail)
        return CommandFacts(Command.POSTCOPY_ADVISE, "command:postcopy-advise")
    if number == Command.PING and length == fmt.U32.size:
        cursor.take(length)
        return CommandFacts(Command.PING, "command:ping")
    if number == Command.OPEN_RETURN_PATH and not length:
        return CommandFacts(Command.OPEN_RETURN_PATH, "command:open-return-path")
    if number == Command.SWITCHOVER_START and not length:
        return CommandFacts(Command.SWITCHOVER_START, "command:switchover-start")
    if number in _POSTCOPY:
        raise Uncertain(fmt.POSTCOPY_STARTED, detail)
    raise Uncertain(fmt.UNKNOWN_COMMAND, detail)


def _check_advice(cursor: Cursor, length: int, detail: str) -> None:
    """With other page sizes RAM's setup has a field more that does not announce itself."""
    if length != 2 * fmt.U64.size:
        raise Uncertain(fmt.UNKNOWN_COMMAND, detail)
    summary = cursor.u64()
    target = cursor.u64()
    if summary != fmt.PAGE_SIZE or target != fmt.PAGE_SIZE:
        raise Uncertain(fmt.POSTCOPY_PAGE_SIZES, f"page sizes {summary:#x}, target {target:#x}")


class RamSetupFacts(NamedTuple):
    """RAM's setup, as read."""

    section_id: int
    total: int
    blocks: tuple[RamBlock, ...]


def read_ram_setup(cursor: Cursor) -> RamSetupFacts:
    """Read a START section up to its footer.

    :raises Uncertain: unless it is RAM's and is understood to the last byte
    """
    cursor.take(1)
    section_id = cursor.u32()
    idstr = cursor.counted()
    instance = cursor.u32()
    version = cursor.u32()
    if idstr != fmt.RAM_IDSTR or instance != fmt.RAM_INSTANCE:
        raise Uncertain(fmt.UNKNOWN_ITERABLE, f"{idstr!r}, instance {instance}")
    if version != fmt.RAM_VERSION:
        raise Uncertain(fmt.UNKNOWN_RAM_VERSION, f"version {version}")
    header = cursor.u64()
    if header & fmt.FLAGS != fmt.MEM_SIZE:
        raise Uncertain(fmt.UNKNOWN_RAM_SETUP, f"header {header:#x}")
    total = header - fmt.MEM_SIZE
    blocks = _read_blocks(cursor, total)
    trailer = cursor.u64()
    if trailer & fmt.MULTIFD_FLUSH:
        raise Uncertain(fmt.MULTIFD_SEEN)
    if trailer & fmt.HOOK:
        raise Uncertain(fmt.HOOK_SEEN)
    if trailer != fmt.EOS:
        raise Uncertain(fmt.UNKNOWN_RAM_SETUP, f"{trailer:#x} behind the blocks")
    return RamSetupFacts(section_id, total, blocks)


def _read_blocks(cursor: Cursor, total: int) -> tuple[RamBlock, ...]:
    blocks: dict[str, RamBlock] = {}
    remaining = total
    while remaining:
        idstr = _printable(cursor.counted(), fmt.UNKNOWN_RAM_SETUP)
        used_length = cursor.u64()
        if idstr in blocks or used_length & fmt.FLAGS or used_length > remaining:
            raise Uncertain(fmt.UNKNOWN_RAM_SETUP, f"block {idstr!r} of {used_length:#x} bytes")
        blocks[idstr] = RamBlock(idstr, used_length)
        remaining -= used_length
    return tuple(blocks.values())


def _printable(raw: bytes, reason: str) -> str:
    """QEMU's names are printable ASCII; anything else is a sign that we are off the track."""
    text = raw.decode("latin-1")
    if not text or not text.isascii() or not text.isprintable():
        raise Uncertain(reason, f"name {raw[:64]!r}")
    return text

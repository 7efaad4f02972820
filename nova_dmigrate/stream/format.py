# SPDX-License-Identifier: Apache-2.0
"""Constants of QEMU's migration stream, and the reasons for which parsing it ends.

All integers of the stream are big-endian. The page of the stream is 4 KiB on x86 always, also
where huge pages back the guest's memory.
"""

from enum import IntEnum
from struct import Struct
from typing import Final

PAGE_SIZE: Final = 4096
PAGE_BITS: Final = 12

# Everything but the RAM pages is small. An element that would not fit into this is taken for
# something that we misunderstand, so that a reader's buffer stays bounded whatever arrives.
MAX_ELEMENT: Final = 1 << 20

U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

# Header: magic, version.
HEADER: Final = bytes.fromhex("5145564d") + U32.pack(3)
RAM_IDSTR: Final = b"ram"
RAM_INSTANCE: Final = 0
RAM_VERSION: Final = 4


class Section(IntEnum):
    """The byte with which everything on the level of sections begins."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(IntEnum):
    """Kinds of COMMAND: u16 command, u16 length, payload."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


# Flags in the low 12 bits of a RAM record's header (the rest is the offset in the RAMBlock).
ZERO: Final = 0x02
MEM_SIZE: Final = 0x04
PAGE: Final = 0x08
EOS: Final = 0x10
CONTINUE: Final = 0x20
XBZRLE: Final = 0x40
HOOK: Final = 0x80
COMPRESS_PAGE: Final = 0x100
MULTIFD_FLUSH: Final = 0x200
FLAGS: Final = PAGE_SIZE - 1

SECTION_START_SIZE: Final = 5
FOOTER_SIZE: Final = 5
RECORD_HEADER_SIZE: Final = 8
PAGE_RECORD_SIZE: Final = RECORD_HEADER_SIZE + PAGE_SIZE
ZERO_RECORD_SIZE: Final = RECORD_HEADER_SIZE + 1
XBZRLE_ENCODING: Final = 1
EOS_RECORD: Final = U64.pack(EOS)

# Why parsing ends. The ordinary end comes first; all others mean that the rest of the migration
# is passed on verbatim because something in it is not known for certain.
RAM_COMPLETE: Final = "RAM is complete"
NOT_A_STREAM: Final = "the bytes do not begin as a migration stream of version 3 does"
UNKNOWN_CONFIGURATION: Final = "the configuration section is not understood"
UNKNOWN_CAPABILITY: Final = "the stream relies on a capability that is not understood"
UNKNOWN_SECTION: Final = "a section of an unknown type or in an unexpected place"
UNKNOWN_ITERABLE: Final = "an iterable section other than RAM"
FULL_BEFORE_RAM: Final = "a device section before RAM is complete"
UNKNOWN_COMMAND: Final = "a command that is not understood"
POSTCOPY_STARTED: Final = "post-copy begins"
POSTCOPY_PAGE_SIZES: Final = "post-copy is advised for pages other than 4 KiB"
UNKNOWN_RAM_VERSION: Final = "RAM of an unknown version"
UNKNOWN_RAM_SETUP: Final = "the list of RAMBlocks is not understood"
UNKNOWN_FOOTER: Final = "a section footer is not where it must be"
UNKNOWN_RECORD: Final = "a RAM record with unknown flags"
UNKNOWN_BLOCK: Final = "a RAM record that names no known RAMBlock"
OFFSET_BEYOND_BLOCK: Final = "a RAM record beyond its RAMBlock's end"
DELTA_MALFORMED: Final = "an XBZRLE record that is not understood"
COMPRESSION_SEEN: Final = "pages are compressed by QEMU"
HOOK_SEEN: Final = "RAM is moved by a transport of its own (RDMA)"
MULTIFD_SEEN: Final = "pages travel on other channels (multifd)"
ELEMENT_TOO_LONG: Final = "an element is longer than any that is known"

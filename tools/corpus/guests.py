# SPDX-License-Identifier: Apache-2.0
"""The two guests whose migrations are recorded: a boot sector and a firmware, both without an OS.

A boot sector is enough to make every kind of RAM record, it is up in less than a second under TCG
and what it leaves in memory compresses to nothing. Both say that memory is ready by writing
``READY`` to the debug console port.
"""

import pathlib
from dataclasses import dataclass

DEBUG_PORT = 0xE9
READY = b"R"

SECTOR = 512
DISK_SIZE = 1 << 20  # SeaBIOS does not boot from AHCI disks of less than one cylinder
FIRMWARE = 64 * 1024
RESET_VECTOR = FIRMWARE - 16

# .code16
#   cli; xor %ax,%ax; mov %ax,%ds
#   inb $0x92,%al; or $2,%al; outb %al,$0x92          A20 on
#   lgdtl gdtr; mov %cr0,%eax; or $1,%al; mov %eax,%cr0; ljmp $0x08,$pm
# .code32
# pm: flat data segments, stack at 0x7000, cld
#   edx = 1 MiB .. 5 MiB: 16 pages of a pattern of their own, 16 pages left zero, and so on
#   edx = 8 MiB .. 8.75 MiB: 192 such pages without a gap
#   outb $'R',$0xe9
# again: incl %ebp                                    the number of the round
#   2 MiB .. 2.25 MiB and 8 MiB .. 8.0625 MiB: one u32 a page is incremented (a small delta)
#   3 MiB .. 3 MiB + 32 KiB: every u32 = round & 1    (pages turn zero and back)
#   16384 empty iterations; jmp again
_BOOT_CODE = bytes.fromhex(
    "fa31c08ed8e4920c02e692660f0116e87c0f20c00c010f22c0ea1e7c080066b8"
    "10008ed88ec08ed0bc00700000fcba00001000e868000000f7c2000001007406"
    "81c20000010081fa0000500072e5ba00008000e84800000081fa00008c0072f3"
    "b052e6e931ed45ba00002000bb00002400e83f000000ba00008000bb00008100"
    "e830000000bf00003000b90020000089e883e001f3abb9004000004975fdebc6"
    "69c2b179379e83c80189d7b900040000f3ab89fac389e825ff030000ff048281"
    "c20010000039da72ecc38db6000000000000000000000000ffff0000009acf00"
    "ffff00000092cf001700d07c0000"
)

# .code16
#   cli; cld; xor %ax,%ax; mov %ax,%es; xor %di,%di
#   mov $0x9e3779b1,%eax; mov $0x1000,%cx; rep stosl  four pages at address 0
#   mov $'R',%al; outb %al,$0xe9
# 1: hlt; jmp 1b
_TINY_CODE = bytes.fromhex("fafc31c08ec031ff66b8b179379eb9001066f3abb052e6e9f4ebfd")

# jmp far f000:0000, where the last 64 KiB of the firmware appear
_RESET_CODE = bytes.fromhex("ea000000f0")


def boot_sector() -> bytes:
    """The disk image of the boot guest: one sector with its 0x55aa mark, padded to DISK_SIZE."""
    sector = _BOOT_CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    return sector.ljust(DISK_SIZE, b"\0")


def firmware() -> bytes:
    """The 64 KiB firmware image of the tiny guest, code at its start, jumped to from reset."""
    return _TINY_CODE.ljust(RESET_VECTOR, b"\0") + _RESET_CODE.ljust(16, b"\0")


@dataclass(frozen=True)
class GuestFiles:
    """The guest images in a directory."""

    directory: pathlib.Path

    @property
    def disk(self) -> pathlib.Path:
        return self.directory / "boot.img"

    @property
    def bios(self) -> pathlib.Path:
        return self.directory / "tiny.bin"

    @classmethod
    def write(cls, directory: pathlib.Path) -> "GuestFiles":
        files = cls(directory)
        files.disk.write_bytes(boot_sector())
        files.bios.write_bytes(firmware())
        return files

# SPDX-License-Identifier: Apache-2.0
"""What is recorded: the machines, their memory, the capabilities of the migration."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20


class Memory(enum.Enum):
    """How the guest's RAM is given to QEMU on the source."""

    DEFAULT = "default"
    FILE = "file"  # memory-backend-file, shared, one file for both ends
    HUGEPAGES = "hugepages"  # memory-backend-memfd with 2 MiB pages
    NUMA = "numa"  # two nodes of half the memory each


@dataclass(frozen=True)
class Variant:
    """One recording. ``machine`` maps the series of QEMU to a machine type (no key: no recording).

    :param reason: why a parser must stop, a constant of nova_dmigrate.stream.format
    :param must_have: statistics (see record.py) without which the recording is made again
    :param passes: least number of dirty-bitmap synchronisations before the guest may be stopped
    :param parameters: migrate-set-parameters of both ends
    :param switch: switch to post-copy after ``passes``
    """

    name: str
    machine: Mapping[str, str]
    memory: Memory = Memory.DEFAULT
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    reason: str = "RAM_COMPLETE"
    tiny: bool = False
    passes: int = 3
    maximum_memory: bool = False
    switch: bool = False
    must_have: tuple[str, ...] = ()

    @property
    def memory_size(self) -> int:
        return MIB if self.tiny else 16 * MIB


SERIES = ("7.2", "10", "11")

PC = dict.fromkeys(SERIES, "pc")
Q35 = dict.fromkeys(SERIES, "q35")
# Stands for the oldest pc-i440fx type that the QEMU at hand has.
OLDEST_PC = "oldest"

# What libvirt asks for on its own in Debian 12 and in sid.
LIBVIRT_9 = ("return-path", "pause-before-switchover", "late-block-activate")
LIBVIRT_12 = (*LIBVIRT_9, "switchover-ack")

# A hot-pluggable block of 128 MiB, all of it unplugged. Sparse: unplugged memory is not sent.
VIRTIO_MEM = ("virtio-mem-pci,memdev=hot,requested-size=0",)
HOT_MEMORY = "memory-backend-ram,id=hot,size=128M"

CHANNELS = {"multifd-channels": 2}
VGA = ("VGA,vgamem_mb=1", "virtio-net-pci,romfile=", "virtio-balloon-pci")

VARIANTS = (
    Variant("tiny", PC, tiny=True, passes=1),
    Variant("pc", PC),
    Variant("q35", Q35),
    Variant("oldest", dict.fromkeys(SERIES, OLDEST_PC)),
    # 2.3 is the last type without configuration and footers, 2.4 the first with both.
    Variant("pc-2.3", {"7.2": "pc-i440fx-2.3"}),
    Variant("pc-2.4", {"7.2": "pc-i440fx-2.4"}),
    # 7.2 is the last type without early setup, 9.2 the last without SWITCHOVER_START.
    Variant("q35-7.2", {"10": "pc-q35-7.2", "11": "pc-q35-7.2"}),
    Variant("q35-9.2", {"10": "pc-q35-9.2", "11": "pc-q35-9.2"}),
    Variant("devices", Q35, devices=VGA),
    Variant("numa", PC, memory=Memory.NUMA),
    Variant("hugepages", Q35, memory=Memory.HUGEPAGES),
    Variant("return-path", PC, capabilities=("return-path",)),
    Variant("libvirt", {"7.2": "q35"}, capabilities=LIBVIRT_9, devices=VGA),
    Variant("libvirt-new", {"10": "q35", "11": "q35"}, capabilities=LIBVIRT_12, devices=VGA),
    Variant("postcopy-advised", PC, capabilities=("postcopy-ram",)),
    Variant(
        "postcopy-hugepages",
        Q35,
        memory=Memory.HUGEPAGES,
        capabilities=("postcopy-ram",),
        reason="POSTCOPY_PAGE_SIZES",
    ),
    Variant(
        "postcopy-switched",
        PC,
        capabilities=("postcopy-ram",),
        # In the first pass: whether anything is left in a later one depends on the machine's speed
        passes=1,
        switch=True,
        must_have=("post_copy_bytes",),
        reason="POSTCOPY_STARTED",
    ),
    Variant(
        "xbzrle",
        PC,
        capabilities=("xbzrle",),
        parameters={"xbzrle-cache-size": 8 * MIB},
        passes=6,
        must_have=("delta_bytes",),
    ),
    # A cache smaller than the dirty set: hits, misses and evictions mix.
    Variant(
        "xbzrle-small-cache",
        Q35,
        capabilities=("xbzrle",),
        parameters={"xbzrle-cache-size": 256 * 1024},
        passes=5,
        must_have=("delta_bytes",),
    ),
    # Types up to 8.0 do not say in the main channel that pages travel on others.
    Variant("multifd", {"7.2": "pc"}, capabilities=("multifd",), parameters=CHANNELS),
    Variant(
        "multifd-7.2-type",
        {"10": "pc-i440fx-7.2", "11": "pc-i440fx-7.2"},
        capabilities=("multifd",),
        parameters=CHANNELS,
    ),
    Variant(
        "multifd",
        {"10": "pc", "11": "pc"},
        capabilities=("multifd",),
        parameters=CHANNELS,
        reason="MULTIFD_SEEN",
    ),
    Variant(
        "ignore-shared",
        PC,
        memory=Memory.FILE,
        capabilities=("x-ignore-shared",),
        reason="UNKNOWN_CAPABILITY",
    ),
    Variant("compress", {"7.2": "pc"}, capabilities=("compress",), reason="COMPRESSION_SEEN"),
    # A second iterable section beside RAM, whose format is not ours to know.
    Variant("dirty-bitmaps", PC, capabilities=("dirty-bitmaps",), reason="UNKNOWN_ITERABLE"),
    # Machine types after 7.2 send the state of virtio-mem before RAM's setup.
    Variant(
        "virtio-mem",
        {"7.2": "q35", "10": "pc-q35-7.2", "11": "pc-q35-7.2"},
        devices=VIRTIO_MEM,
        maximum_memory=True,
    ),
    Variant(
        "virtio-mem-early",
        {"10": "q35", "11": "q35"},
        devices=VIRTIO_MEM,
        maximum_memory=True,
        reason="FULL_BEFORE_RAM",
    ),
)


BY_NAME = {f"{series}/{each.name}": each for each in VARIANTS for series in each.machine}


def select(series: str, pattern: str = "") -> list[Variant]:
    """The variants that this series of QEMU records and whose name contains the pattern."""
    return [each for each in VARIANTS if series in each.machine and pattern in each.name]

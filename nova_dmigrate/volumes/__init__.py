# SPDX-License-Identifier: Apache-2.0
"""Readers of a volume at the destination host, one module for each way to reach one."""

from collections.abc import Callable

from nova_dmigrate import exception
from nova_dmigrate.volumes import nbd, rbd
from nova_dmigrate.volumes.base import (
    BLOCK_SIZE,
    Keys,
    VolumeAccess,
    VolumeReader,
    VolumeSpec,
    aligned_buffer,
)
from nova_dmigrate.volumes.block import BlockReader
from nova_dmigrate.volumes.image_location import ImageLocation
from nova_dmigrate.volumes.iscsi_unit import IscsiUnit
from nova_dmigrate.volumes.nbd import NbdReader
from nova_dmigrate.volumes.rbd import RbdReader
from nova_dmigrate.volumes.rbd_location import RbdLocation

__all__ = [
    "BLOCK_SIZE",
    "DRIVERS",
    "IMAGE_DRIVERS",
    "BlockReader",
    "ImageLocation",
    "IscsiUnit",
    "Keys",
    "NbdReader",
    "RbdLocation",
    "RbdReader",
    "VolumeAccess",
    "VolumeReader",
    "VolumeSpec",
    "aligned_buffer",
    "open_volume",
    "usable_drivers",
]

DRIVERS: dict[str, Callable[[VolumeSpec, VolumeAccess], VolumeReader]] = {
    "block": lambda spec, _: BlockReader(spec),
    "iscsi": NbdReader,
    "luks": NbdReader,
    "nbd": NbdReader,
    "rbd": RbdReader,
}
#: Those whose location is an `ImageLocation`; by their names hosts tell what they allow.
IMAGE_DRIVERS = ("iscsi", "luks", "nbd")
_USABLE: dict[str, Callable[[], bool]] = {
    "rbd": rbd.usable,
    **dict.fromkeys(IMAGE_DRIVERS, nbd.usable),
}


def usable_drivers() -> tuple[str, ...]:
    """Those for which this host has what they need."""
    return tuple(sorted(name for name in DRIVERS if name not in _USABLE or _USABLE[name]()))


def open_volume(spec: VolumeSpec, access: VolumeAccess) -> VolumeReader:
    """Open a volume with the driver that its specification names.

    :raises VolumeOpenError: if there is no such driver, or it cannot open the volume.
    """
    driver = DRIVERS.get(spec.driver)
    if driver is None:
        known = ", ".join(sorted(DRIVERS))
        raise exception.VolumeOpenError(
            volume=spec.volume_id, reason=f"there is no driver {spec.driver!r}; known: {known}"
        )
    return driver(spec, access)

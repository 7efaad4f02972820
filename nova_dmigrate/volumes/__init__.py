# SPDX-License-Identifier: Apache-2.0
"""Readers of a volume at the destination host, one module for each way to reach one."""

from collections.abc import Callable

from nova_dmigrate import exception
from nova_dmigrate.volumes.base import BLOCK_SIZE, VolumeReader, VolumeSpec, aligned_buffer
from nova_dmigrate.volumes.block import BlockReader

__all__ = [
    "BLOCK_SIZE",
    "DRIVERS",
    "BlockReader",
    "VolumeReader",
    "VolumeSpec",
    "aligned_buffer",
    "open_volume",
]

DRIVERS: dict[str, Callable[[VolumeSpec], VolumeReader]] = {
    "block": BlockReader,
}


def open_volume(spec: VolumeSpec) -> VolumeReader:
    """Open a volume with the driver that its specification names.

    :raises VolumeOpenError: if there is no such driver, or it cannot open the volume.
    """
    driver = DRIVERS.get(spec.driver)
    if driver is None:
        known = ", ".join(sorted(DRIVERS))
        raise exception.VolumeOpenError(
            volume=spec.volume_id, reason=f"there is no driver {spec.driver!r}; known: {known}"
        )
    return driver(spec)

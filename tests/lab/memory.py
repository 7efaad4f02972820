# SPDX-License-Identifier: Apache-2.0
"""Bit-exact comparison of two guests' memory."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.lab.guest import PAGE_SIZE, Guest

_STEP = 4096  # pages compared at a time, 16 MiB


def compare_ram(a: Path | NDArray[np.uint8], b: Path | NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of the 4 KiB pages that differ between two RAM images (files or arrays of pages)."""
    left, right = _pages(a), _pages(b)
    if left.shape != right.shape:
        raise ValueError(f"images of {left.shape[0]} and {right.shape[0]} pages")
    differing = [
        start + np.flatnonzero((left[start : start + _STEP] != right[start : start + _STEP]).any(1))
        for start in range(0, left.shape[0], _STEP)
    ]
    return np.concatenate(differing).astype(np.int64)


def differing_pages(a: Guest, b: Guest) -> NDArray[np.int64]:
    """Pages that differ between two stopped guests, numbered through their RAMBlocks in order.

    Needs spec.exact if the guest ran during the migration.
    """
    if a.spec.shared and b.spec.shared:
        found, base = [], 0
        for name in a.spec.block_names:
            found.append(compare_ram(a.ram_blocks[name], b.ram_blocks[name]) + base)
            base += a.ram_blocks[name].shape[0]
        return np.concatenate(found)
    left, right = (guest.pmemsave(guest.directory / "ram.img") for guest in (a, b))
    try:
        return compare_ram(left, right)
    finally:
        left.unlink()
        right.unlink()


def _pages(image: Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(image, Path):
        return np.memmap(image, np.uint8, "r").reshape(-1, PAGE_SIZE)
    return image

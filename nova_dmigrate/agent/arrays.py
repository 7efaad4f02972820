# SPDX-License-Identifier: Apache-2.0
"""Large arrays for a short time.

Each has a mapping of its own, not memory of the heap: it takes no more than was written to, and
is given back to the system at once when the array is dropped.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def zeros(size: int, kind: type[np.generic]) -> NDArray[Any]:
    """``size`` zeros of one type."""
    room = mmap.mmap(-1, max(1, size * np.dtype(kind).itemsize))
    return np.frombuffer(room, kind, size)

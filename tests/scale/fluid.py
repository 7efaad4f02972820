# SPDX-License-Identifier: Apache-2.0
"""How flows share what they go through: max-min fairly, as TCP and storage do it about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: What is left of a capacity counts as nothing below this share of it.
_NOTHING = 1e-9


def max_min(through: NDArray[np.int64], caps: Floats, capacities: Floats) -> Floats:
    """The rate of each flow, float (flows,).

    All rates grow together; a flow stops where its own cap is reached or something that it goes
    through is used up.

    :param through: what each flow goes through, int (flows, k), numbers of capacities; -1 for
        nothing.
    :param caps: the most that each flow takes, (flows,); infinity for no cap.
    :param capacities: (capacities,).
    """
    rates = np.zeros(len(caps))
    left = capacities.astype(np.float64)
    growing = caps > 0
    used = through >= 0
    while growing.any():
        sharing = np.bincount(through[growing][used[growing]], minlength=len(capacities)).astype(
            np.float64
        )
        shared = sharing > 0
        step = float((caps[growing] - rates[growing]).min())
        if shared.any():
            step = min(step, float((left[shared] / sharing[shared]).min()))
        rates[growing] += step
        left -= step * sharing
        exhausted = left <= _NOTHING * capacities
        stopped = rates >= caps * (1 - _NOTHING)
        stopped |= (exhausted[np.where(used, through, 0)] & used).any(axis=1)
        growing &= ~stopped
    return rates


def jain(values: Floats) -> float:
    """Jain's index of fairness: 1 where all values are equal, 1/n where one has everything."""
    total = float(np.square(values).sum())
    return float(values.sum()) ** 2 / (len(values) * total) if total else 1.0

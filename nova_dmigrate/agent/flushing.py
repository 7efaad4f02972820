# SPDX-License-Identifier: Apache-2.0
"""Which of a server's variables make it write its dirty pages, and to what they are set.

What MySQL's and MariaDB's page cleaners have in common: while more of the pool is dirty than
``innodb_max_dirty_pages_pct`` says, they write ``innodb_io_capacity`` pages a second. The low-water
mark must be 0 for that: otherwise it decides, and less is written the closer the goal is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nova_dmigrate.agent.database import PoolStatus

CAPACITY_MAX = "innodb_io_capacity_max"
CAPACITY = "innodb_io_capacity"
IDLE = "innodb_idle_flush_pct"
LOW_WATER = "innodb_max_dirty_pages_pct_lwm"
HIGH_WATER = "innodb_max_dirty_pages_pct"

# The order in which they can be set without one clamping another: the capacity stays below its
# maximum, the low-water mark below the high one. Restoring goes backwards.
ORDER = (CAPACITY_MAX, CAPACITY, IDLE, LOW_WATER, HIGH_WATER)

_HEADROOM = 1.25


def plan(
    variables: Mapping[str, str], pool: PoolStatus, seconds: float, max_bytes: int
) -> dict[str, str]:
    """New values of variables, in the order in which to set them.

    :param variables: the values of `ORDER` that the server has.
    :param seconds: the time in which all pages that are dirty now should be written.
    :param max_bytes: the most to write in a second. A server that is allowed more keeps that.
    """
    wanted = math.ceil(pool.dirty / seconds * _HEADROOM)
    allowed = max(1, max_bytes // pool.page_bytes)
    values: dict[str, str] = {}
    if CAPACITY in variables:
        capacity = max(int(variables[CAPACITY]), min(wanted, allowed))
        if capacity > int(variables.get(CAPACITY_MAX, capacity)):
            values[CAPACITY_MAX] = str(capacity)
        values[CAPACITY] = str(capacity)
    if IDLE in variables:
        values[IDLE] = "100"
    if LOW_WATER in variables:
        values[LOW_WATER] = "0"
    if HIGH_WATER in variables:
        values[HIGH_WATER] = "0"
    return {name: value for name, value in values.items() if not equal(value, variables[name])}


def equal(one: str, other: str) -> bool:
    """Whether two values are the same number, however a server writes it."""
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-9, abs_tol=1e-6)
    except ValueError:
        return one == other

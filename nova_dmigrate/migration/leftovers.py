# SPDX-License-Identifier: Apache-2.0
"""What a migration that has failed leaves at its destination, until libvirt there has cleaned up.

One whose libvirt was killed in the midst of it finds the guest's QEMU when it is back, and ends it.
The next migration may come before that is done.
"""

import re

#: Seconds that a destination gets to clean up; :data:`PAUSE`: between two attempts.
PATIENCE = 30.0
PAUSE = 1.0

# virDomainObjListAddLocked of libvirt; nothing but the text tells these errors from others
_IN_THE_WAY = re.compile(r"\bdomain\b.* is already (being removed|active)\b")


def in_the_way(error: str) -> bool:
    """Whether libvirt could not begin a migration because the destination has the domain yet."""
    return _IN_THE_WAY.search(error) is not None


def still_there(error: str) -> str:
    """The error of a migration for which the destination has not cleaned up in time."""
    return (
        f"{error} (at the destination, for {PATIENCE:g} s now: if it is what an earlier migration"
        " has left, destroy it there)"
    )

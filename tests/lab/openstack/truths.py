# SPDX-License-Identifier: Apache-2.0
"""What must be true of a live migration, and whether it is."""

import dataclasses
import enum

from tests.lab.openstack.move import COMPLETED, Move, Summary


class Way(enum.Enum):
    """How the memory travels, for sentences."""

    STOCK = "by Nova's own driver"
    VOLUME = "through the relays, with pages from the volume"
    #: It may be known before the migration begins, or only then.
    BARE = "in any way, without pages from the volume"
    ORDINARY = "in the ordinary way"


@dataclasses.dataclass(frozen=True)
class Truth:
    """What must be true once a migration is over.

    :ivar way: how the memory has travelled, or was about to.
    :ivar reason: DMigrate's code for why not otherwise.
    :ivar status: Nova's word for the end.
    :ivar matched: the share of references to pages of the volume that more than match; what is
        sent as a reference and cannot be read comes over the network.
    """

    way: Way
    reason: str | None = None
    status: str = COMPLETED
    matched: float = 0.5

    def __str__(self) -> str:
        why = f", because {self.reason}" if self.reason else ""
        return f"{self.status} {self.way.value}{why}"

    def lies(self, move: Move) -> list[str]:
        """What is not so."""
        told = move.summary
        found = []
        if move.status != self.status:
            found.append(f"Nova says {move.status}")
        if (move.source == move.host) == (self.status == COMPLETED):
            found.append(f"the server, which was on {move.source}, is on {move.host}")
        if bool(told) != (self.way is not Way.STOCK):
            found.append(f"DMigrate tells {told or 'nothing'}")
        elif told:
            found += self._untold(told)
        return found

    def _untold(self, told: Summary) -> list[str]:
        """What DMigrate tells that is not so."""
        state, reason, mode = told["state"], told["fallback_reason"], told["mode"]
        pages = told["pages_referenced"]
        found = []
        if state != self.status:
            found.append(f"DMigrate says {state}")
        if reason != self.reason:
            found.append(f"it is so {f'because of {reason}' if reason else 'for no reason'}")
        wanted = {Way.VOLUME: "dmigrate", Way.ORDINARY: "ordinary"}.get(self.way, mode)
        if mode != wanted:
            found.append(f"the mode is {mode}")
        # One that is not completed may not have come so far as to use what it has read
        if self.status != COMPLETED and self.way is Way.VOLUME and not told["volume_bytes"]:
            found.append("nothing was read of the volume")
        if bool(pages) != (self.way is Way.VOLUME) and self.status == COMPLETED:
            found.append(f"{pages} pages were references")
        elif pages and self.status == COMPLETED and pages - told["misses"] <= self.matched * pages:
            found.append(f"{told['misses']} of {pages} references did not match")
        return found

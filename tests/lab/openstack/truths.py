# SPDX-License-Identifier: Apache-2.0
"""What must be true of a live migration, and whether it is."""

import dataclasses
import enum
from typing import Any

from tests.lab.openstack.client import COMPLETED
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.working import Move


class Way(enum.Enum):
    """How the memory travels, for sentences."""

    STOCK = "by Nova's own driver"
    VOLUME = "through the relays, with pages from the volume"


@dataclasses.dataclass(frozen=True)
class Truth:
    """What must be true once a migration is over. ``way``: how the memory has travelled."""

    way: Way

    def __str__(self) -> str:
        return f"completed {self.way.value}"

    def lies(self, move: Move) -> list[str]:
        """What is not so."""
        told = move.summary
        found = []
        if move.status != COMPLETED:
            found.append(f"Nova says {move.status}")
        if move.source == move.host:
            found.append(f"the server is still on {move.host}")
        if bool(told) != (self.way is not Way.STOCK):
            found.append(f"DMigrate tells {told or 'nothing'}")
        elif told:
            reason, pages = told["fallback_reason"], told["pages_referenced"]
            if not pages or reason is not None:
                found.append(f"{pages} pages were references, {reason or 'for no reason'}")
        return found


def described(move: Move) -> str:
    """What became of it, in a sentence."""
    told = move.summary
    if not told:
        return f"{move.status}, DMigrate says nothing"
    why = f", {told['fallback_reason']}" if told["fallback_reason"] else ""
    pages = f", {told['pages_referenced']} references" if told["pages_referenced"] else ""
    return f"{move.status}, {told['mode']} {told['state']} in {told['total_s']:.1f} s{why}{pages}"


def places(cloud: OpenStack, server: Any) -> list[str]:
    """Names of the hosts on which libvirt has a server's guest."""
    found = []
    for name, compute in cloud.computes.items():
        connection = compute.host.connect()
        try:
            if server.id in [each.UUIDString() for each in connection.listAllDomains()]:
                found.append(name)
        finally:
            connection.close()
    return found

# SPDX-License-Identifier: Apache-2.0
"""How many relays a host has room for, and what share of its bandwidth each has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nova_dmigrate.buffermap import PAGE_SIZE


@dataclass(frozen=True)
class Rates:
    """Bytes a second; 0 for no cap."""

    network: float = 0.0
    volume: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What the relays of a host may take together.

    :ivar max_relays: of each role.
    :ivar memory: bytes; 0 for no limit.
    :ivar relay_memory: what one relay takes whatever its guest, by role, in bytes.
    :ivar page_memory: what it takes for each guest page that may be mapped, in bytes; at most
        ``max_pages`` are.
    :ivar host: of all relays together. :ivar relay: of each of them.
    """

    max_relays: int = 4
    memory: int = 0
    relay_memory: Mapping[str, int] = field(default_factory=lambda: {"source": 0, "destination": 0})
    page_memory: int = 0
    max_pages: int = 0
    host: Rates = Rates()
    relay: Rates = Rates()

    def needs(self, load: "Load") -> int:
        """Bytes that a relay takes at most."""
        pages = min(load.guest_memory // PAGE_SIZE, self.max_pages)
        return self.relay_memory[load.role] + pages * self.page_memory


@dataclass(frozen=True)
class Load:
    """A relay that runs, or shall. ``guest_memory``: bytes of its guest."""

    role: str
    guest_memory: int = 0


@dataclass(frozen=True)
class Claim:
    """A relay that runs, and the caps of its own migration."""

    session_id: str
    role: str
    caps: Rates


def shortage(limits: Limits, running: Sequence[Load], wanted: Load) -> str | None:
    """What keeps one more relay from starting; None if there is room.

    A migration starts its destination relay first, and holds it while its source relay waits. So
    destinations must never take all that a source needs, of a guest as large as their largest:
    hosts that migrate to each other would wait for each other.
    """
    roles = [each.role for each in running]
    count = roles.count(wanted.role)
    if count >= limits.max_relays:
        return f"{count} {wanted.role} relays run"
    if limits.memory:
        loads = [*running, wanted]
        if wanted.role == "destination" and "source" not in roles:
            loads.append(Load("source", max(each.guest_memory for each in loads)))
        taken = sum(map(limits.needs, loads))
        if taken > limits.memory:
            return f"the relays would take {taken >> 20} MiB of memory"
    return None


def shares(limits: Limits, claims: Sequence[Claim]) -> dict[str, Rates]:
    """The caps of the running relays, by session: the network's of sources, the volumes' of
    destinations.
    """
    result = {}
    for role, kind in (("source", "network"), ("destination", "volume")):
        claiming = [claim for claim in claims if claim.role == role]
        own = getattr(limits.relay, kind)
        caps = [_lower(getattr(claim.caps, kind), own) for claim in claiming]
        fair = fair_shares(getattr(limits.host, kind), caps)
        for claim, share in zip(claiming, fair, strict=True):
            result[claim.session_id] = Rates(**{kind: share})
    return result


def fair_shares(total: float, caps: Sequence[float]) -> list[float]:
    """``total`` shared equally, where nobody gets more than its cap and the others get the rest.

    0 means no cap, in what is given and in what is returned.
    """
    if not total:
        return list(caps)
    result = [0.0] * len(caps)
    left = total
    order = sorted(range(len(caps)), key=lambda index: caps[index] or float("inf"))
    for done, index in enumerate(order):
        equal = left / (len(order) - done)
        result[index] = _lower(caps[index], equal)
        left -= result[index]
    return result


def _lower(one: float, other: float) -> float:
    return min(one, other) if one and other else one or other

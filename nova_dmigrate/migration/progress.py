# SPDX-License-Identifier: Apache-2.0
"""How far a migration is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Progress:
    """A moment of a migration, as its caller is told about twice a second. Figures are cumulative.

    :ivar phase: what goes on, a word or two for an operator.
    :ivar elapsed: seconds since the migration began.
    :ivar guest_bytes: bytes of QEMU's stream that the source has taken.
    :ivar wire_bytes: bytes that the network has carried.
    :ivar volume_bytes: bytes that the destination has read from volumes.
    :ivar ram_bytes: the guest's memory; 0 as long as it is not known.
    :ivar mapped_pages: guest pages of which the buffer map tells the volume block.
    :ivar network_rate: bytes a second over the network, of the last moments.
    :ivar volume_rate: the same from volumes.
    :ivar remaining_bytes: what QEMU has still to send; None if it does not tell.
    :ivar unresolved: references that are not settled.
    :ivar misses: references whose digest did not match, or whose block could not be read.
    :ivar passes: QEMU's passes over the guest's memory.
    :ivar max_downtime_ms: QEMU's downtime limit, in milliseconds; None if it is not known.
    """

    phase: str
    elapsed: float = 0.0
    guest_bytes: int = 0
    wire_bytes: int = 0
    volume_bytes: int = 0
    ram_bytes: int = 0
    mapped_pages: int = 0
    network_rate: float = 0.0
    volume_rate: float = 0.0
    remaining_bytes: int | None = None
    unresolved: int = 0
    misses: int = 0
    passes: int = 0
    max_downtime_ms: int | None = None

# SPDX-License-Identifier: Apache-2.0
"""The destination's arbiter: for each entry of the page map, who speaks last.

An entry goes through these states; a page that the source sends in full settles it from any of
them.

- UNKNOWN: nothing has come. -> SPECULATED when its block is read; -> REFERENCED when the reference
  comes first; -> UNREADABLE when its block cannot be read.
- SPECULATED: the block was emitted, its digest is remembered. -> SETTLED (hit) or MISSED by the
    reference.
- REFERENCED: the reference waits for the block. -> SETTLED (hit), MISSED, or SETTLED by a copy sent
    unasked.
- MISSED: the source was asked for its copy. -> SETTLED by the copy.
- SETTLED: the volume has no say any more.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.digest import DIGEST_SIZE

UNKNOWN, SPECULATED, REFERENCED, MISSED, SETTLED, UNREADABLE = range(6)

Entries = NDArray[np.int64]
Slots = NDArray[np.uint32]
Digests = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What follows from an event for the entries it was about.

    :ivar emit: bool (n,), which of them go to QEMU now; None where none can.
    :ivar settled: slots whose references are resolved.
    :ivar changed: slots of misses because the volume holds something else.
    :ivar unreadable: slots of misses because the volume cannot be read.
    """

    emit: Mask | None
    settled: Slots
    changed: Slots
    unreadable: Slots


_NO_SLOTS: Slots = np.empty(0, np.uint32)


class EntryTable:
    """States, slots and digests of all entries; changed by one thread only.

    21 bytes an entry, of which the kernel provides what is touched.
    """

    def __init__(self, count: int) -> None:
        self._state = np.zeros(count, np.uint8)
        self._slot = np.zeros(count, np.uint32)
        self._digest = np.zeros((count, DIGEST_SIZE), np.uint8)
        self._unsettled = count > 0
        #: Entries whose block is still of use.
        self.wanted_count = count
        #: References that wait for their block.
        self.referenced = 0
        #: References whose copies were asked for.
        self.missed = 0
        self.hits = 0
        self.speculated = 0
        #: Blocks that were emitted and later replaced by a page sent in full.
        self.replaced = 0

    def __len__(self) -> int:
        return len(self._state)

    @property
    def open(self) -> int:
        """References that are not resolved."""
        return self.referenced + self.missed

    @property
    def unsettled(self) -> bool:
        """Whether a page that is sent in full could still concern an entry."""
        return self._unsettled

    def wanted(self, entries: Entries) -> Mask:
        """Which entries a read of their block would serve. Other threads may ask: a late answer
        costs a read.
        """
        states = self._state[entries]
        wanted: Mask = states == UNKNOWN
        wanted |= states == REFERENCED
        return wanted

    def settle_first(self, count: int) -> None:
        """The source has sent the first entries' pages before there was a table."""
        self._state[:count] = SETTLED
        self.wanted_count -= count

    def pages(self, entries: Entries) -> Verdict:
        """The source has sent these guest pages in full (raw or zero): whatever came before is
        void.
        """
        states = self._state[entries]
        waiting = entries[states == REFERENCED]
        settled = self._slot[waiting]
        self.referenced -= len(waiting)
        # The copy of a missed one is on its way: it will find the entry settled.
        self.missed -= int(np.count_nonzero(states == MISSED))
        self.replaced += int(np.count_nonzero(states == SPECULATED))
        self.wanted_count -= int(np.count_nonzero((states == UNKNOWN) | (states == REFERENCED)))
        self._state[entries] = SETTLED
        return Verdict(None, settled, _NO_SLOTS, _NO_SLOTS)

    def references(self, entries: Entries, slots: Slots, digests: Digests) -> Verdict:
        """The source refers to these entries' blocks.

        :raises ValueError: the source has already spoken of one of them.
        """
        states = self._state[entries]
        if bool(((states == REFERENCED) | (states == MISSED) | (states == SETTLED)).any()):
            raise ValueError("a page was referenced after it had been sent")
        self._slot[entries] = slots
        read = states == SPECULATED
        hit = read.copy()
        if read.any():
            hit[read] = (self._digest[entries[read]] == digests[read]).all(axis=1)
        changed = read & ~hit
        unreadable = states == UNREADABLE
        waiting = states == UNKNOWN
        self._digest[entries[waiting]] = digests[waiting]
        self._state[entries[hit]] = SETTLED
        self._state[entries[changed | unreadable]] = MISSED
        self._state[entries[waiting]] = REFERENCED
        self.hits += int(np.count_nonzero(hit))
        self.missed += int(np.count_nonzero(changed | unreadable))
        self.referenced += int(np.count_nonzero(waiting))
        return Verdict(None, slots[hit], slots[changed], slots[unreadable])

    def blocks(self, entries: Entries, digests: Digests) -> Verdict:
        """The blocks of these entries have been read, and their pages would have these digests."""
        states = self._state[entries]
        unknown = states == UNKNOWN
        hit = states == REFERENCED
        changed = hit.copy()
        if hit.any():
            hit[hit] = (self._digest[entries[hit]] == digests[hit]).all(axis=1)
        changed &= ~hit
        fresh = entries[unknown]
        self._digest[fresh] = digests[unknown]
        self._state[fresh] = SPECULATED
        self._state[entries[hit]] = SETTLED
        self._state[entries[changed]] = MISSED
        hits, misses = int(np.count_nonzero(hit)), int(np.count_nonzero(changed))
        self.hits += hits
        self.speculated += len(fresh)
        self.wanted_count -= len(fresh) + hits + misses
        self.referenced -= hits + misses
        self.missed += misses
        slots = self._slot[entries]
        return Verdict(unknown | hit, slots[hit], slots[changed], _NO_SLOTS)

    def fail(self, entries: Entries) -> Verdict:
        """The blocks of these entries cannot be read."""
        states = self._state[entries]
        waiting = entries[states == REFERENCED]
        unknown = entries[states == UNKNOWN]
        self._state[unknown] = UNREADABLE
        self.wanted_count -= len(unknown) + len(waiting)
        self._state[waiting] = MISSED
        self.referenced -= len(waiting)
        self.missed += len(waiting)
        return Verdict(None, _NO_SLOTS, _NO_SLOTS, self._slot[waiting])

    def copies(self, entries: Entries, slots: Slots) -> Verdict:
        """The source's copies for these entries have come, asked for or not."""
        states = self._state[entries]
        same = self._slot[entries] == slots
        missed = same & (states == MISSED)
        waiting = same & (states == REFERENCED)
        emit = missed | waiting
        self._state[entries[emit]] = SETTLED
        self.missed -= int(np.count_nonzero(missed))
        self.referenced -= int(np.count_nonzero(waiting))
        self.wanted_count -= int(np.count_nonzero(waiting))
        return Verdict(emit, slots[waiting], _NO_SLOTS, _NO_SLOTS)

    def withdraw(self) -> Entries:
        """Entries that were emitted and of which the source never spoke; they count as settled from
        now on.
        """
        unspoken = np.flatnonzero(self._state == SPECULATED)
        self._state[:] = SETTLED
        self._unsettled = False
        self.wanted_count = 0
        return unspoken

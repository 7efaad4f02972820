# SPDX-License-Identifier: Apache-2.0
"""Whether a migration through relays has come to a standstill that nobody will end.

QEMU waits without end for a source relay that hangs, and libvirt for QEMU.
"""

import time
from collections.abc import Callable

from nova_dmigrate.migration.job import Job

#: Seconds for libvirt to notice by itself that a relay has failed, as it does where QEMU is left by
#: the relay at its end.
_GRACE = 5.0
#: Seconds beyond the relays' own: they give up first, where they can.
_MARGIN = 10.0
#: Seconds without a word of libvirt, after which it is not known what QEMU has sent meanwhile.
_GAP = 3.0
#: Seconds of a standstill after which nothing is begun that only these relays can bring to its end.
_DOUBT = 15.0
#: Seconds for libvirt to end what a relay that hangs holds. At a switchover that is QEMU, which
#: heeds nobody then: only the relay's end helps, and the guest stands still until then.
HUNG_PATIENCE = 10.0


class Stall:
    """Watches one migration. Memory that moves is never a standstill, whoever is silent.

    :param stall_timeout: seconds of silence after which relays give each other up.
    :param clock: monotonic seconds.
    """

    def __init__(self, stall_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = stall_timeout + _MARGIN
        self._clock = clock
        self._sent: int | None = None
        self._seen = self._moved = clock()
        self._failed: float | None = None
        self._still = 0.0

    def reason(self, job: Job | None, failure: str | None, silence: float) -> str | None:
        """Why it will not go on; None as long as it may. To be called several times a second.

        :param job: what libvirt tells at this moment; None if nothing.
        :param failure: why a relay has failed, if one has.
        :param silence: seconds for which the source relay has told nothing.
        """
        now = self._clock()
        if job is not None:
            if job.transferred != self._sent or now > self._seen + _GAP:
                self._sent, self._moved = job.transferred, now
            self._seen = now
        if failure is not None:
            self._failed = self._failed or now
            return failure if now > max(self._failed, self._moved) + _GRACE else None
        self._still = min(silence, now - self._moved)
        return None if job is None or self._still <= self._patience else self._sentence()

    def doubt(self) -> str | None:
        """Why it may be one that will not go on, long before it is known; None if it is not."""
        return self._sentence() if self._still > _DOUBT else None

    def _sentence(self) -> str:
        still = self._still
        return f"source relay: it tells nothing, and QEMU has sent nothing, for {still:.0f} s"

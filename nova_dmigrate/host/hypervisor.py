# SPDX-License-Identifier: Apache-2.0
"""The versions of this host's libvirt and QEMU, as its service tells them to others."""

import logging
import threading
import time
from collections.abc import Callable

from nova_dmigrate import exception

LOG = logging.getLogger(__name__)

#: libvirt's version and QEMU's, numbered as libvirt does; None for what is not known.
Versions = tuple[int | None, int | None]

UNKNOWN: Versions = (None, None)
#: Seconds for which they are taken to stay as they are, and after which a libvirt that has not told
#: them is asked again.
_INTERVAL, _RETRY = 600.0, 60.0


class HypervisorVersions:
    """Asks libvirt now and then. Nobody waits for that: a libvirt may hang.

    :param ask: returns both; raises HypervisorError. May take as long as it wants.
    """

    def __init__(self, ask: Callable[[], Versions]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._known = UNKNOWN
        self._due = float("-inf")
        self._asking = False

    def known(self) -> Versions:
        """What was told last, within a moment."""
        with self._lock:
            if not self._asking and time.monotonic() >= self._due:
                self._asking = True
                threading.Thread(target=self._look, name="hypervisor", daemon=True).start()
            return self._known

    def _look(self) -> None:
        found = UNKNOWN
        try:
            found = self._ask()
        except exception.HypervisorError as error:
            LOG.info("The versions of libvirt and QEMU are not known: %s", error)
        finally:
            with self._lock:
                self._known, self._asking = found, False
                self._due = time.monotonic() + (_RETRY if found == UNKNOWN else _INTERVAL)

# SPDX-License-Identifier: Apache-2.0
"""For how long a guest that has come here stood still.

While a migration goes on libvirt has QEMU's forecast. What it was is known at the end, and then to
the destination's libvirt alone: the source's, which has handed it all figures, has no such domain.
"""

import logging
import threading
from collections.abc import Callable

from nova_dmigrate import exception

LOG = logging.getLogger(__name__)

#: Of a domain, by its name or UUID: milliseconds, None if they are not told. Raises MigrationError.
#: May take as long as it wants.
Ask = Callable[[str], float | None]

#: Seconds that libvirt gets: whoever asks waits meanwhile.
_PATIENCE = 0.8


def of_domain(name: str, ask: Ask, patience: float = _PATIENCE) -> float | None:
    """Milliseconds; None if libvirt does not know, or does not tell within ``patience`` seconds."""
    found: list[float | None] = []

    def look() -> None:
        try:
            found.append(ask(name))
        except exception.MigrationError as error:
            LOG.info("The downtime is not known: %s", error)

    thread = threading.Thread(target=look, name="downtime", daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        LOG.warning("The downtime of %s is not known: libvirt does not answer", name)
    return found[0] if found else None

# SPDX-License-Identifier: Apache-2.0
"""A relay as a process, seen from the service that starts it."""

import re
import signal
import sys
from pathlib import Path

from nova_dmigrate.host.relays import Identity, RelayFiles, RelayProcess
from tests import base

#: Reads nothing until it is told to, and then says how much there was.
_SLOW = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
signal.pause()
print(len(sys.stdin.read()), flush=True)
"""


class SpawnTest(base.TestCase):
    def test_a_relay_that_does_not_read_holds_up_nobody(self) -> None:
        here = self.make_directory()
        files = RelayFiles(here / "events", here / "control", here / "summary")
        noted: list[Identity] = []
        text = "x" * (400 << 10)
        relay = RelayProcess.spawn(
            [sys.executable, "-c", _SLOW], {"volumes": text}, files, noted.append
        )
        self.addCleanup(relay.bury)
        self.addCleanup(relay.signal, signal.SIGKILL)
        self.assertTrue(relay.alive())
        while not catches(noted[0].pid, signal.SIGTERM):
            self.assertFalse(relay.wait(0.05))
        relay.signal(signal.SIGTERM)
        self.assertTrue(relay.wait(60))
        self.assertEqual(len('{"volumes": ""}') + len(text), int(files.events.read_text()))


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)

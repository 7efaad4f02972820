# SPDX-License-Identifier: Apache-2.0
"""Real block devices for the tests."""

import os
import subprocess
from pathlib import Path

import fixtures


def available() -> bool:
    """Whether this machine lets us make loop devices."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists()


class LoopDevice(fixtures.Fixture):
    """A loop device on a file; ``path`` is the device's."""

    def __init__(self, backing: Path, sector_size: int = 512) -> None:
        super().__init__()
        self._command = ["losetup", "--find", "--show", "--sector-size", str(sector_size)]
        self._command.append(str(backing))

    def _setUp(self) -> None:
        # Another process may take the free device that losetup has found.
        for attempt in range(10):
            done = subprocess.run(self._command, capture_output=True, text=True, check=False)
            if not done.returncode:
                break
            if attempt == 9:
                raise AssertionError(done.stderr)
        self.path = done.stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "--detach", self.path], check=True)

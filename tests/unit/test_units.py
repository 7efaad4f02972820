# SPDX-License-Identifier: Apache-2.0
"""systemd understands every line of the units that the package brings."""

import re
import shutil
import subprocess
from pathlib import Path

from tests import base

UNITS = Path(__file__).parents[2] / "etc" / "systemd"


class UnitsTest(base.TestCase):
    def told_of(self, name: str, text: str) -> str:
        """What systemd says of a unit, but that its program is not installed."""
        path = self.make_directory() / name
        path.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    def test_there_is_nothing_to_say(self) -> None:
        base.require(None if shutil.which("systemd-analyze") else "there is no systemd")
        units = sorted(UNITS.glob("*.service"))
        self.assertEqual(2, len(units))
        for unit in units:
            text = unit.read_text()
            self.assertEqual("", self.told_of(unit.name, text))
            # It would have had something to say
            self.assertIn("TaskMax", self.told_of(unit.name, f"{text}\n[Service]\nTaskMax=64\n"))

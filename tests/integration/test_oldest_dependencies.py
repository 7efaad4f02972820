# SPDX-License-Identifier: Apache-2.0
"""The command line with the oldest cliff that it may be installed with, as beside Nova 32.

It comes from the index of pip.
"""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import base

ROOT = Path(__file__).parents[2]


class OldestCliffTest(base.TestCase):
    def test_every_command_can_be_loaded(self) -> None:
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        (oldest,) = re.findall(r"(?m)^cliff>=(\S+)", setup["extras"]["host"])
        directory = self.make_directory()
        self.run_python(
            "-m", "pip", "install", "-q", "--target", str(directory), f"cliff=={oldest}"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}
        version = "from importlib.metadata import version; print(version('cliff'))"
        self.assertEqual(f"{oldest}\n", self.run_python("-c", version, env=environment))
        for command in ("migrate", "check", "history", "show", "report"):
            told = self.run_python(
                *("-W", "ignore", "-m", "nova_dmigrate.cmd.cli.app", command, "--help"),
                env=environment,
            )
            self.assertIn(f"nova-dmigrate {command}", told)

    @staticmethod
    def run_python(*arguments: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{arguments}: {done.stdout}{done.stderr}")
        return done.stdout

# SPDX-License-Identifier: Apache-2.0
"""Programs without the extras that they need."""

import os
import subprocess
import sys
from pathlib import Path

from nova_dmigrate.cmd import extras
from tests import base

ROOT = Path(__file__).parents[3]
#: Modules, what is not installed, the arguments; the extra that has to be named.
PROGRAMS = (
    ("cli.app", "cliff", ("history",), "host"),
    ("cli.app", "rich", ("history",), "host"),
    ("cli.app", "libvirt", ("check", "db1"), "host"),
    ("cli.app", "oslo_messaging", ("check", "db1"), "host"),
    ("status", "oslo_upgradecheck", ("upgrade", "check"), "host"),
    ("status", "oslo_messaging", ("upgrade", "check"), "host"),
    ("host", "oslo_messaging", (), "host"),
    ("host", "libvirt", (), "host"),
    ("agent", "pymysql", ("grants",), "agent"),
    ("agent", "oslo_messaging", ("serve",), "agent"),
)
#: The program as it is where a module is not installed.
_WITHOUT = """
import runpy, sys
missing, program = sys.argv[1:3]
sys.modules[missing] = None
sys.argv[1:3] = []
runpy.run_module(program, run_name="__main__")
"""


class ProgramsTest(base.TestCase):
    def run_without(self, missing: str, program: str, *arguments: str) -> tuple[int, str]:
        directory = self.make_directory()
        config = directory / "nova-dmigrate.conf"
        config.write_text(
            f"[agent]\ntransport = broker\ninstance = {'0' * 8}-{'0' * 4}-4000-8000-{'0' * 12}\n"
            f"[host]\nlibvirt_uri = test:///default\nstate_directory = {directory}/state\n"
            f"socket_directory = {directory}/sockets\nqemu_user =\nqemu_group =\n"
            f"[migration]\nhistory_directory = {directory}\n"
        )
        module = f"nova_dmigrate.cmd.{program}"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _WITHOUT, missing, module]
            + ["--config-file", str(config), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    def test_each_says_which_extra_is_not_installed(self) -> None:
        for program, missing, arguments, extra in PROGRAMS:
            status, told = self.run_without(missing, program, *arguments)
            said = f"{program} without {missing}: {told}"
            self.assertEqual(2, status, said)
            self.assertIn(f"'{extra}'", told, said)
            self.assertIn(missing, told, said)
            self.assertNotIn("Traceback", told, said)


class NeededTest(base.TestCase):
    def test_a_part_of_the_package_is_of_no_extra(self) -> None:
        def load() -> None:
            with extras.needed("program", "host"):
                import nova_dmigrate.no_such_module  # noqa: F401

        self.assertRaises(ModuleNotFoundError, load)

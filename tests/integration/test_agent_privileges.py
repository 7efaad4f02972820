# SPDX-License-Identifier: Apache-2.0
"""The capabilities of the unit file are enough for the agent, and none is too many.

The agent runs as its command line, against a real server, as root with nothing but those
capabilities, as systemd would start it, and as an ordinary user to whom they were given.
"""

import configparser
import contextlib
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests import base
from tests.lab import databases

ROOT = Path(__file__).parents[2]
VOLUME = "0ab1c2d3-volume"


def unit_capabilities() -> list[str]:
    """What the unit file allows, in its words (CAP_SYS_ADMIN)."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(ROOT / "etc" / "systemd" / "nova-dmigrate-agent.service")
    return parser["Service"]["CapabilityBoundingSet"].split()


def as_root(capabilities: Sequence[str]) -> list[str]:
    """The command that goes before another to run it as the unit does."""
    named = "".join(f",+{_short(each)}" for each in capabilities)
    return ["setpriv", f"--bounding-set=-all{named}", "--inh-caps=-all", "--no-new-privs"]


def as_nobody(capabilities: Sequence[str]) -> list[str]:
    """The command that goes before another to run it as an ordinary user with capabilities."""
    named = "".join(f",+{_short(each)}" for each in capabilities)
    user = pwd.getpwnam("nobody")
    return [
        *("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"),
        *(f"--bounding-set=-all{named}", f"--inh-caps=-all{named}", f"--ambient-caps=-all{named}"),
        "--no-new-privs",
    ]


def _short(capability: str) -> str:
    return capability.removeprefix("CAP_").lower()


class TestPrivileges(base.TestCase):
    server: ClassVar[databases.MariaDB]
    volume: ClassVar[databases.LoopVolume]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available())
        with contextlib.ExitStack() as stack:
            cls.server, cls.volume = stack.enter_context(databases.mariadb())
            cls.server.fill(tables=1, rows=50000)
            cls.server.flush()
            cls._stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    def agent(self, prefix: Sequence[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
        """One command of the agent, in this tree, with the privileges that ``prefix`` leaves it."""
        directory = self.make_directory()
        os.chmod(directory, 0o755)
        config = directory / "agent.conf"
        config.write_text(
            f"[agent]\ndatadir = {self.server.datadir}\nsql_user = root\n"
            f"state_directory = {directory / 'state'}\n"
            f"volume_names = {self.volume.name}:{VOLUME}\n"
        )
        return subprocess.run(
            [*prefix, sys.executable, "-m", "nova_dmigrate.cmd.agent"]
            + [f"--config-file={config}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            cwd=ROOT,
        )

    def map(self, prefix: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return self.agent(prefix, "map", "--json")

    def findings(self, prefix: Sequence[str]) -> dict[str, list[str]]:
        """What ``check`` finds: messages by code."""
        found: dict[str, list[str]] = {}
        for each in json.loads(self.agent(prefix, "check", "--json").stdout)["findings"]:
            found.setdefault(each["code"], []).append(each["message"])
        return found

    def pages(self, done: "subprocess.CompletedProcess[str]") -> int:
        self.assertEqual(0, done.returncode, done.stderr)
        made: dict[str, Any] = json.loads(done.stdout)
        self.assertEqual([], made["findings"])
        return int(made["volumes"][VOLUME])

    def without(self, capability: str) -> list[str]:
        return [each for each in unit_capabilities() if each != capability]

    def test_the_capabilities_of_the_unit_are_enough(self) -> None:
        unlimited = self.pages(self.map([]))
        self.assertGreater(unlimited, 1000)
        for run in (as_root, as_nobody):
            with self.subTest(run.__name__):
                pages = self.pages(self.map(run(unit_capabilities())))
                self.assertGreater(pages, 0.9 * unlimited)

    def test_check_finds_nothing_missing_with_those_capabilities(self) -> None:
        found = self.findings(as_root(unit_capabilities()))
        self.assertIn("may-prepare", found)
        for code in ("no-capability", "no-privilege", "no-map"):
            self.assertNotIn(code, found)

    def test_without_sys_ptrace_it_says_so_and_makes_no_map(self) -> None:
        for run in (as_root, as_nobody):
            self.check_missing("CAP_SYS_PTRACE", run(self.without("CAP_SYS_PTRACE")))

    def test_without_sys_admin_it_says_so_and_makes_no_map(self) -> None:
        for run in (as_root, as_nobody):
            self.check_missing("CAP_SYS_ADMIN", run(self.without("CAP_SYS_ADMIN")))

    def check_missing(self, capability: str, prefix: Sequence[str]) -> None:
        done = self.map(prefix)
        self.assertEqual((1, ""), (done.returncode, done.stdout))
        self.assertIn("Missing privilege: ", done.stderr)
        self.assertIn(capability, done.stderr)
        (message,) = self.findings(prefix)["no-capability"]
        self.assertIn(f"Without {capability} ", message)

    def test_without_dac_read_search_it_says_so_and_maps_nothing(self) -> None:
        # Not as an ordinary user: it may not be able to read the agent itself then
        prefix = as_root(self.without("CAP_DAC_READ_SEARCH"))
        done = self.map(prefix)
        self.assertEqual(1, done.returncode, done.stderr)
        told = json.loads(done.stdout)
        self.assertEqual({}, told["volumes"])
        (reason,) = (each for each in told["findings"] if each["code"] == "unreadable")
        self.assertEqual("problem", reason["severity"])
        self.assertIn(str(self.server.datadir), reason["message"])
        self.assertIn("the agent needs CAP_DAC_READ_SEARCH", reason["message"])
        done = self.agent(prefix, "map")
        self.assertEqual(1, done.returncode, done.stderr)
        self.assertIn("[unreadable]", done.stdout)
        found = self.findings(prefix)
        (message,) = found["no-capability"]
        self.assertIn("Without CAP_DAC_READ_SEARCH ", message)
        self.assertIn("no-frames", found)

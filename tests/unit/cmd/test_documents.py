# SPDX-License-Identifier: Apache-2.0
"""The reference of the commands has all that they take, and the package what the chapters say."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

from nova_dmigrate.cmd.cli.display import SUMMARY_COLUMNS
from tests import base

ROOT = Path(__file__).parents[3]
CHAPTER = ROOT / "doc/source/user/cli.rst"
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]+")
#: Of oslo.log and oslo.config, told by their documentation.
FOREIGN = {
    *("--log-config", "--log_config", "--log-config-append", "--log-date-format", "--logdir"),
    *("--logfile", "--nodebug", "--nouse-journal", "--nouse-json", "--nouse-syslog"),
    *("--shell_completion", "--syslog-log-facility", "--use-json", "--use-syslog"),
}
COMMANDS = {
    "cli.app": ("migrate", "check", "history", "show", "report"),
    "status": (),
    "host": (),
    "relay": (),
    "agent": ("serve", "check", "map", "warm-up", "restore", "grants"),
}


class ReferenceTest(base.TestCase):
    def test_every_program_is_in_it(self) -> None:
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        scripts = dict(
            line.split(" = ")
            for line in setup["entry_points"]["console_scripts"].strip().splitlines()
        )
        modules = {f"nova_dmigrate.cmd.{module}:main" for module in COMMANDS}
        self.assertEqual(modules, set(scripts.values()))
        text = CHAPTER.read_text()
        for name in scripts:
            self.assertIn(f"\n{name}\n{'=' * len(name)}\n", text)

    def test_every_command_and_option_is_in_it(self) -> None:
        text = CHAPTER.read_text()
        told = set(_OPTION.findall(text))
        for module, commands in COMMANDS.items():
            known = set(_OPTION.findall(help_of(module)))
            for command in commands:
                # Without a word in between: what stands there may be of another program
                self.assertRegex(text, rf"(?m)^(nova-dmigrate |``){command}\b")
                known |= set(_OPTION.findall(help_of(module, command)))
            self.assertEqual(set(), known - told - FOREIGN, module)

    def test_whoever_starts_the_agent_says_what_it_shall_do(self) -> None:
        lines = [
            line.partition("nova-dmigrate-agent")[2].split()
            for path in (ROOT / "README.rst", *(ROOT / "doc/source").rglob("*.rst"))
            for line in path.read_text().splitlines()
            if re.match(r"\s+([#$] )?nova-dmigrate-agent [^[]", line)
        ]
        self.assertGreater(len(lines), 3)
        for words in lines:
            self.assertIn(words[:1], [[command] for command in COMMANDS["agent"]])

    def test_the_keys_of_a_migration_are_those_of_the_table(self) -> None:
        table = CHAPTER.read_text().partition("A migration as JSON has these keys")[2]
        table = table.partition("The files of the history")[0]
        rows = re.findall(r"(?m)^   \* - (.*)$", table)
        self.assertEqual(set(SUMMARY_COLUMNS), set(re.findall(r"``(\w+)``", " ".join(rows))))


class PackageTest(base.TestCase):
    def test_files_that_chapters_name_are_in_the_package(self) -> None:
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        packaged, place = set(), ""
        for line in setup["files"]["data_files"].strip().splitlines():
            if line.endswith("="):
                place = line.rstrip(" =")
                continue
            self.assertTrue((ROOT / line).is_file(), line)
            packaged.add(f"{place}/{Path(line).name}")
        named = set()
        for chapter in (ROOT / "doc/source").rglob("*.rst"):
            named |= set(re.findall(r"/opt/nova-dmigrate/((?:etc|share)/\S+)", chapter.read_text()))
        self.assertEqual((set(), True), (named - packaged, bool(named)))


def help_of(module: str, *command: str) -> str:
    """What a program says to --help."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"nova_dmigrate.cmd.{module}", *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},  # no option is broken at a line's end
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout

# SPDX-License-Identifier: Apache-2.0
"""What README.rst says of the plugin's variables is what its files do."""

import re
from pathlib import Path

from tests import base
from tests.unit.devstack.node import ROOT

PLUGIN = ROOT / "devstack"
_NAME = re.compile(r"\bNOVA_DMIGRATE_[A-Z_]+\b")
#: Made of others, not to be set.
_DERIVED = {"NOVA_DMIGRATE_DIR", "NOVA_DMIGRATE_CONF"}


def _scripts() -> list[Path]:
    return [PLUGIN / "settings", PLUGIN / "plugin.sh", *sorted((PLUGIN / "lib").iterdir())]


class VariablesTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.text = (PLUGIN / "README.rst").read_text()
        chapter = self.text.partition("\nVariables\n")[2].partition("\nHow it is tested\n")[0]
        heads = [line for line in chapter.splitlines() if line.startswith("``")]
        self.documented = [name for line in heads for name in _NAME.findall(line)]
        self.chapter = chapter

    def test_each_variable_is_described_once(self) -> None:
        used = {name for path in _scripts() for name in _NAME.findall(path.read_text())}
        self.assertEqual(sorted(used - _DERIVED), sorted(self.documented))

    def test_no_file_is_forgotten(self) -> None:
        sourced = re.search(r"for \w+ in ([a-z ]+);", (PLUGIN / "plugin.sh").read_text())
        assert sourced is not None
        parts = {path.name for path in (PLUGIN / "lib").iterdir()}
        self.assertEqual(parts, set(sourced[1].split()))

    def test_the_defaults_are_those_of_the_settings(self) -> None:
        settings = (PLUGIN / "settings").read_text()
        literal = r"^(NOVA_DMIGRATE_\w+)=\$\{NOVA_DMIGRATE_\w+:?-([^$}]+)\}$"
        defaults = re.findall(literal, settings.replace("\\\n    ", ""), re.MULTILINE)
        self.assertGreater(len(defaults), 5)
        for name, value in defaults:
            entry = re.search(rf"``{name}``.*?\n(?=\n``|\Z)", self.chapter + "\n", re.DOTALL)
            assert entry is not None
            self.assertIn(f"``{value}``", entry[0], name)

    def test_every_line_of_a_console_is_of_a_program_that_there_is(self) -> None:
        tool = re.search(r"/opt/stack/nova-dmigrate/(\S+)", self.text)
        assert tool is not None
        self.assertTrue((ROOT / tool[1]).is_file())

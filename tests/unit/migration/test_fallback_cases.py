# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import nova_dmigrate
from nova_dmigrate.migration.fallback import Reason
from tests import base
from tests.guests.fallbacks import BUGS, CASES, NOVAS, TOO_OLD

MIGRATION = Path(nova_dmigrate.__file__).parent / "migration"


class FallbackCasesTest(base.TestCase):
    def test_each_reason_is_brought_about_in_a_whole_migration(self) -> None:
        codes = {reason.code for reason in Reason}
        self.assertEqual(set(), codes - set(CASES) - {*NOVAS, *TOO_OLD, *BUGS})
        self.assertEqual(set(), set(CASES) - codes)

    def test_what_is_of_novas_ways_alone_is_found_nowhere_else(self) -> None:
        text = "".join(path.read_text() for path in MIGRATION.glob("[!f]*.py"))
        for reason in Reason:
            if reason.code in NOVAS:
                self.assertFalse(f"Reason.{reason.name}" in text, reason)

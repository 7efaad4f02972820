# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.migration.fallback import Reason, because
from tests import base

DOCUMENT = Path(__file__).parents[3] / "doc/source/admin/migration.rst"


class FallbackTest(base.TestCase):
    def test_codes_are_unique_and_each_is_documented(self):
        codes = [reason.code for reason in Reason]
        self.assertEqual(len(codes), len(set(codes)))
        text = DOCUMENT.read_text()
        for code in codes:
            self.assertIn(f"``{code}``", text)

    def test_the_error_names_the_instance_and_keeps_the_code(self):
        error = because(Reason.SMALL_MAP, "db-1", share=0.034)
        self.assertIsInstance(error, exception.FallBack)
        self.assertEqual("small-map", error.kwargs["code"])
        self.assertEqual(
            "Migration of db-1: only 3.4% of the guest's memory could be read from volumes",
            str(error),
        )

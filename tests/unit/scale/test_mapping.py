# SPDX-License-Identifier: Apache-2.0
"""A small map goes the whole way, each side in a process of its own."""

from tests import base
from tests.lab.processes import workspace
from tests.scale import mapping, synthetic, tables


class MappingTest(base.TestCase):
    def test_all_sides_see_the_same_map(self) -> None:
        shape = synthetic.Shape.of_gib(0.125, synthetic.SCATTERED)
        with workspace() as directory:
            row = mapping.measure(directory, shape)
        pages = row["host"]["pages"]
        self.assertEqual(4 * row["agent"]["frames"], pages)
        self.assertEqual(pages, row["relays"]["mapped_pages"])
        self.assertEqual(pages, row["source"]["entries"])
        self.assertEqual(pages, row["destination"]["hits"])
        # A guest of which all but a quarter is the pool
        self.assertAlmostEqual(0.75, row["source"]["hit_share"], 1)
        self.assertLessEqual(row["source"]["map_bytes"], 8 * pages)
        self.assertGreater(row["agent"]["wire_bytes"], row["host"]["chunk_bytes"])
        self.assertIn("0.125  scattered", tables.render({"maps": [row]}))
        self.assertEqual([], mapping.excesses(row))
        for part, key in (("agent", "peak_mb"), ("host", "peak_mb"), ("source", "peak_mb"),
                          ("destination", "peak_mb"), ("relays", "source_peak_mb"),
                          ("relays", "destination_peak_mb"), ("source", "map_bytes")):  # fmt: skip
            more = {**row, part: {**row[part], key: row[part][key] + (1 << 20)}}
            (told,) = mapping.excesses(more)
            self.assertTrue(told.startswith("0.125 GiB, scattered: "), told)

    def test_what_does_not_fit_is_refused(self) -> None:
        shape = synthetic.Shape.of_gib(1 << 30)
        with workspace() as directory:
            row = mapping.measure(directory, shape)
            self.assertEqual([], list(directory.iterdir()))
        self.assertIn("MiB are needed", row["refused"])
        self.assertIn("MiB are needed", tables.render({"maps": [row]}))

# SPDX-License-Identifier: Apache-2.0
"""The plots: real PNGs, and what stands in their figures."""

import struct
import zlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from nova_dmigrate.report import overview, palette, plots, timeline
from nova_dmigrate.report.runs import checked, grouped
from tests import base
from tests.unit.report.examples import MB, Run, make_run, make_series, three_runs


def decode(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and the raw samples of a PNG, whose checksums must be right."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    place, packed, size = 8, b"", (0, 0)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", png, place + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        if kind == b"IHDR":
            size = struct.unpack_from(">II", content)
        elif kind == b"IDAT":
            packed += content
        place += 12 + length
    return size[0], size[1], zlib.decompress(packed)


def colours(axes: Axes) -> set[str]:
    return {to_hex(patch.get_facecolor()).upper() for patch in axes.patches}


class DrawTest(base.TestCase):
    def test_every_group_gets_a_timeline_and_all_together_an_overview(self) -> None:
        runs = checked([*three_runs(), make_run(scenario="TPC-C / 5$", series=make_series())])
        pictures = plots.draw(runs)
        self.assertEqual(
            ["overview", "timeline-01-oltp-read-write", "timeline-02-tpc-c-5"],
            [picture.name for picture in pictures],
        )
        for picture in pictures:
            width, height, samples = decode(picture.png)
            self.assertTrue(600 < width < 4000 and 250 < height < 4000, (width, height))
            # Something is drawn: more than a few colours of a page that is not all white
            self.assertGreater(len(set(samples)), 20)

    def test_more_modes_than_fit_go_on_in_another_figure(self) -> None:
        runs = checked([make_run("pre-copy", series=make_series()) for _ in range(7)])
        names = [picture.name for picture in plots.draw(runs)]
        self.assertEqual(
            ["overview", "timeline-01-oltp-read-write", "timeline-01-oltp-read-write-6"], names
        )

    def test_equal_runs_give_equal_files(self) -> None:
        one, other = (plots.draw(checked(three_runs())) for _ in range(2))
        self.assertEqual([each.png for each in one], [each.png for each in other])

    def test_the_callers_settings_of_matplotlib_stay(self) -> None:
        before = dict(matplotlib.rcParams)
        plots.draw(checked(three_runs()))
        self.assertEqual(before, dict(matplotlib.rcParams))

    def test_odd_series_are_drawn_too(self) -> None:
        for series in (
            {"network": [[0, 0]]},
            {"volume": [[0, 0], [1, 5]], "downtime": None},
            {"tps": [], "latency_ms": [[0, 0], [1, 5]]},
            {"tps": [[3, 1], [2, 2]], "downtime": [0, 0]},
            {"network": [[0, 5], [0, 5]]},
        ):
            pictures = plots.draw(checked([make_run(total_s=None, series=series)]))
            self.assertEqual(2, len(pictures), series)
            decode(pictures[1].png)

    def test_runs_with_next_to_nothing_are_drawn_too(self) -> None:
        self.assertEqual((), plots.draw([]))
        (picture,) = plots.draw(
            checked([{"scenario": "x", "mode": "dmigrate", "completed": False, "total_s": 0}])
        )
        decode(picture.png)
        bare = {"scenario": "x", "mode": "dmigrate", "completed": True}
        self.assertEqual((), plots.draw(checked([bare])))


class RateTest(base.TestCase):
    def test_a_steady_pace_is_its_rate(self) -> None:
        points = [[moment / 10, 5 * MB * moment] for moment in range(101)]
        rates = timeline.rate(points, np.linspace(0, 10, 41))
        np.testing.assert_allclose(rates, 50 * MB)

    def test_all_bytes_are_in_the_rates_and_none_outside_of_the_records(self) -> None:
        points = [[2.0, 0], [3.0, 70 * MB], [2.5, 10 * MB]]
        edges = np.linspace(0, 10, 41)
        rates = timeline.rate(points, edges)
        self.assertAlmostEqual(70 * MB, float((rates * np.diff(edges)).sum()), places=3)
        self.assertEqual(0, rates[edges[:-1] >= 3].sum() + rates[edges[1:] <= 2].sum())

    def test_one_point_is_no_rate(self) -> None:
        self.assertEqual([0, 0], list(timeline.rate([[1, 5]], np.linspace(0, 1, 3))))


class TimelineTest(base.TestCase):
    def figure(self, *runs: Run) -> list[Axes]:
        drawn = checked(runs)
        names = [run["mode"] for run in drawn]
        axes: list[Axes] = timeline.figure("title", names, drawn).axes
        return axes

    def test_each_run_has_a_column_of_panels_on_common_axes(self) -> None:
        axes = self.figure(*three_runs())
        self.assertEqual(9, len(axes))
        self.assertEqual(1, len({each.get_xlim() for each in axes}))
        self.assertEqual(["pre-copy", "post-copy", "dmigrate"], [a.get_title() for a in axes[:3]])
        for panel, unit in zip(axes[::3], ("MB/s", "transactions/s", "ms"), strict=True):
            self.assertIn(unit, panel.get_ylabel())
        self.assertIn("seconds", axes[-1].get_xlabel())

    def test_the_downtime_is_marked_where_it_was_and_named(self) -> None:
        (panel, *others) = self.figure(make_run(series=make_series()))
        self.assertEqual(["down 180 ms"], [text.get_text() for text in panel.texts])
        for axes in (panel, *others):
            self.assertIn(palette.DOWNTIME, colours(axes))
            (mark,) = [line for line in axes.lines if line.get_color() == palette.DOWNTIME]
            self.assertEqual([13.8, 13.8], list(mark.get_xdata()))

    def test_the_legend_names_what_is_drawn_and_nothing_else(self) -> None:
        def legend(run: Run) -> list[str]:
            drawn = checked([run])
            (made,) = timeline.figure("title", ["x"], drawn).legends
            return [text.get_text() for text in made.get_texts()]

        self.assertEqual(
            [
                *("network", "volume", "limit of the network", "limit of both"),
                *("90 % of the throughput before", "migration", "downtime"),
            ],
            legend(make_run(series=make_series())),
        )
        bare = make_run(network_mb_s=None, tps_before=None, series={"network": [[0, 0], [1, 1]]})
        self.assertEqual(["network", "volume", "migration"], legend(bare))

    def test_statements_have_a_panel_of_their_own(self) -> None:
        series = {"tps": [[0, 5], [1, 6]], "qps": [[0, 50], [1, 60]], "latency_ms": [[0, 1]]}
        axes = self.figure(make_run(series=series))
        for panel, unit in zip(axes, ("transactions/s", "queries/s", "ms"), strict=True):
            self.assertIn(unit, panel.get_ylabel())
        self.assertEqual(0, axes[1].get_ylim()[0])

    def test_rows_without_data_are_left_out(self) -> None:
        axes = self.figure(make_run(series={"tps": [[0, 5], [1, 6]]}))
        self.assertEqual(1, len(axes))
        self.assertIn("transactions/s", axes[0].get_ylabel())


class OverviewTest(base.TestCase):
    def figure(self, *runs: Run) -> list[Axes]:
        made = overview.figure(grouped(checked(runs)))
        assert made is not None
        axes: list[Axes] = made.axes
        return axes

    def test_bars_have_their_runs_lengths(self) -> None:
        axes = self.figure(*three_runs())
        titles = [each.get_title() for each in axes]
        self.assertEqual("total time", titles[0])
        self.assertEqual(4, len(titles))
        self.assertEqual([28.0, 25.0, 14.0], [bar.get_width() for bar in axes[0].patches])
        self.assertEqual(palette.DMIGRATE, to_hex(axes[0].patches[2].get_facecolor()).upper())
        both = [bar.get_width() for bar in axes[2].patches[-2:]]
        np.testing.assert_allclose(both, [0.7, 0.65])
        self.assertEqual(["s", "ms", "GB", "transactions/s"], [a.get_xlabel() for a in axes])

    def test_what_did_not_complete_is_hatched_and_named(self) -> None:
        first = self.figure(make_run("pre-copy", completed=False), make_run())[0]
        self.assertEqual(["////", None], [bar.get_hatch() for bar in first.patches])
        labels = [label.get_text() for label in first.get_yticklabels()]
        self.assertEqual(["pre-copy †", "dmigrate"], labels)

    def test_panels_without_data_are_left_out(self) -> None:
        axes = self.figure(make_run(tps_during=None, downtime_ms=None))
        titles = [each.get_title() for each in axes]
        self.assertEqual(["total time", "bytes by path"], titles)


class PaletteTest(base.TestCase):
    def test_what_stands_side_by_side_differs_in_lightness_as_well(self) -> None:
        def lightness(colour: str) -> float:
            red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue

        self.assertGreater(abs(lightness(palette.NETWORK) - lightness(palette.VOLUME)), 0.2)

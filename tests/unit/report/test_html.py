# SPDX-License-Identifier: Apache-2.0
"""The HTML: well-formed, and nothing outside of it is referred to."""

import re
from xml.etree import ElementTree

from nova_dmigrate.report import html
from nova_dmigrate.report.comparison import compare
from nova_dmigrate.report.picture import Picture
from nova_dmigrate.report.runs import checked
from tests import base
from tests.unit.report.examples import make_run, three_runs

EVIL = "<script src='http://evil.example/x.js'>alert(1)</script>\x00\x1b[31m\"&amp;"


def make_page(**changes: str) -> str:
    runs = checked([*three_runs(), make_run("pre-copy", scenario="tpc-c", **changes)])
    picture = Picture("one", f"A plot {changes}", "What it shows", b"\x89PNG not really")
    return html.page(
        f"A report {changes}",
        runs,
        {"CPU": "two cores", "memory": 8, **changes},
        compare(runs),
        [picture],
        [html.Section("Migration", ("a sentence", str(changes)))],
    )


def urls(page: str) -> set[str]:
    """Whatever a browser could fetch: attributes of that kind, and urls in styles."""
    root = ElementTree.fromstring(page)
    kinds = ("src", "href", "data", "action", "poster", "srcset", "background", "cite", "manifest")
    found = {element.get(kind) or "" for element in root.iter() for kind in kinds}
    styles = " ".join(element.text or "" for element in root.iter("style"))
    styles += " ".join(element.get("style") or "" for element in root.iter())
    return (found | set(re.findall(r"url\(|@import", styles))) - {""}


class PageTest(base.TestCase):
    def test_it_is_well_formed_and_refers_to_nothing_outside(self) -> None:
        page = make_page()
        root = ElementTree.fromstring(page)
        self.assertTrue(page.startswith("<!DOCTYPE html>"))
        self.assertEqual("html", root.tag)
        self.assertTrue(all(url.startswith("data:image/png;base64,") for url in urls(page)))
        self.assertEqual(1, len(urls(page)))
        tags = {element.tag for element in root.iter()}
        self.assertFalse(tags & {"script", "link", "iframe", "object", "embed", "base", "form"})
        policy = root.find("head/meta[@http-equiv='Content-Security-Policy']")
        self.assertIsNotNone(policy)
        self.assertNotIn("://", page)

    def test_what_others_have_written_is_text_and_nothing_else(self) -> None:
        page = make_page(database=EVIL)
        root = ElementTree.fromstring(page)
        self.assertEqual([], list(root.iter("script")))
        self.assertNotIn("\x00", page)
        self.assertNotIn("\x1b", page)
        told = "".join(root.itertext())
        self.assertIn("<script src='http://evil.example/x.js'>alert(1)</script>", told)
        self.assertEqual(1, len(urls(page)))

    def test_every_run_sentence_and_fact_is_in_it(self) -> None:
        root = ElementTree.fromstring(make_page())
        rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
        self.assertEqual(
            ["pre-copy", "post-copy", "dmigrate", "pre-copy"],
            [row[0] for row in rows if len(row) > 1 and row[0] != "mode"],
        )
        text = "".join(root.itertext())
        for part in ("2.00 times as quick as pre-copy", "a sentence", "two cores", "tpc-c"):
            self.assertIn(part, text)
        image = next(root.iter("img"))
        self.assertEqual("What it shows", image.get("alt"))

    def test_a_run_that_was_not_as_it_should_be_stands_out(self) -> None:
        no_room = {"fallback_reason": "no-room"}
        for run, wanted in (
            (make_run(), "dmigrate"),
            (make_run(**no_room), "dmigrate trouble"),
            (make_run(check_ok=None), "dmigrate"),
            (make_run(check_ok=False), "dmigrate trouble"),
            (make_run("pre-copy", lost_commits=1), "trouble"),
            (make_run("pre-copy", completed=False), "trouble"),
            # Whoever asks for an ordinary migration gets a reason, too
            (make_run("ordinary", **no_room), ""),
        ):
            with self.subTest(wanted):
                page = html.page("one", checked([run]), {}, compare([]), [])
                *_, row = ElementTree.fromstring(page).iter("tr")
                self.assertEqual(wanted, row.get("class"))

    def test_sections_without_lines_are_left_out(self) -> None:
        page = html.page("empty", [], {}, compare([]), [])
        titles = [element.text for element in ElementTree.fromstring(page).iter("h2")]
        self.assertEqual(["The runs"], titles)

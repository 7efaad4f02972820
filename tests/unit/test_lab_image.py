# SPDX-License-Identifier: Apache-2.0
"""The commands that build the lab's images."""

import contextlib
from pathlib import Path

import fixtures

from tests import base
from tests.lab import image
from tests.lab.relays import wait_until


class CommandsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()

    def refusal(self, *argv: str) -> str:
        return str(self.assertRaises(image.ImageError, image.run, list(argv), self.directory))

    def test_what_a_command_prints_is_returned(self) -> None:
        self.assertEqual(
            "here\n", image.run(["sh", "-c", "echo here; echo no >&2"], self.directory)
        )

    def test_one_that_fails_or_is_not_there_is_told(self) -> None:
        told = self.refusal("sh", "-c", "echo no room >&2; exit 3")
        self.assertEqual("sh -c echo no room >&2; exit 3 failed: no room", told)
        self.assertEqual("no-such-program is not installed", self.refusal("no-such-program"))

    def test_one_that_takes_too_long_is_told_and_ends_with_all_that_it_has_started(self) -> None:
        self.useFixture(fixtures.MonkeyPatch("tests.lab.image.PATIENCE", 3))
        # It hears of it, as one that has something mounted has to
        script = "trap 'touch put-away; exit' TERM; sleep 600 & echo $! >child; wait"
        told = self.refusal("bash", "-c", script)
        self.assertIn("has not ended within 3 s", told)
        self.assertTrue((self.directory / "put-away").exists())
        child = int((self.directory / "child").read_text())
        wait_until(lambda: not _runs(child), "its child has ended")


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

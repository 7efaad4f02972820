# SPDX-License-Identifier: Apache-2.0
"""The live display, in a real terminal and elsewhere."""

import io
import os
import pty
import re
import threading

from nova_dmigrate.cmd.cli import progress
from nova_dmigrate.migration.progress import Progress
from tests import base

MIB = 1 << 20
BUSY = Progress(
    phase="migrating",
    elapsed=72.4,
    wire_bytes=620 * MIB,
    volume_bytes=930 * MIB,
    ram_bytes=2048 * MIB,
    mapped_pages=240000,
    network_rate=49.8 * MIB,
    volume_rate=95.1 * MIB,
    remaining_bytes=512 * MIB,
    unresolved=345,
    misses=12,
    passes=1,
    max_downtime_ms=300,
)


def in_terminal(*moments: Progress) -> str:
    """What a terminal gets to see, with its control sequences."""
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        # A terminal whose other end is closed is an error (Linux)
        try:
            while part := os.read(master, 65536):
                seen.append(part)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(slave, "w") as stream:
            with progress.shown("db1", stream, quiet=False) as tell:
                for moment in moments:
                    tell(moment)
    finally:
        reader.join()
        os.close(master)
    return b"".join(seen).decode()


class TerminalTest(base.TestCase):
    def test_a_block_is_redrawn_and_what_it_said_last_stays(self) -> None:
        text = in_terminal(Progress("checking"), BUSY)
        self.assertIn("\x1b[", text)
        last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("db1")[-1]
        for part in (
            "migrating",
            "01:12",
            "network  620.0 MiB  49.8 MiB/s",
            "volume  930.0 MiB  95.1 MiB/s",
            "remaining 512.0 MiB of 2048.0 MiB",
            "misses 12",
            "unresolved 345",
            "mapped 937.5 MiB",
            "passes 1",
            "downtime limit 300 ms",
        ):
            self.assertIn(part, " ".join(last.replace("   ", "  ").split("\r\n")), last)
        self.assertTrue(text.rstrip().endswith("\x1b[?25h"), "the cursor is back")

    def test_what_is_not_known_is_not_shown(self) -> None:
        text = in_terminal(Progress("checking"))
        self.assertNotIn("remaining", text)
        self.assertNotIn("limit", text)

    def test_odd_figures_do_no_harm(self) -> None:
        in_terminal(
            Progress("x", remaining_bytes=5, ram_bytes=0),
            Progress("x", remaining_bytes=9 * MIB, ram_bytes=MIB),
            Progress("[bold]x[/nonsense]", elapsed=1e6),
        )


class ElsewhereTest(base.TestCase):
    def lines(self, *moments: Progress, quiet: bool = False) -> list[str]:
        stream = io.StringIO()
        with progress.shown("db1", stream, quiet) as tell:
            for moment in moments:
                tell(moment)
        return stream.getvalue().splitlines()

    def test_a_line_says_everything(self) -> None:
        self.assertEqual(
            [
                "db1: 72 s, migrating, network 620.0 MiB (49.8 MiB/s), volume 930.0 MiB"
                " (95.1 MiB/s), remaining 512.0 MiB, misses 12"
            ],
            self.lines(BUSY),
        )

    def test_there_is_a_line_from_time_to_time_and_for_each_phase(self) -> None:
        moments = [Progress("migrating", elapsed=half / 2) for half in range(25)]
        lines = self.lines(*moments, Progress("converging", elapsed=12.5))
        self.assertEqual(["0 s", "5 s", "10 s", "12 s"], [line.split()[1] + " s" for line in lines])
        self.assertIn("converging", lines[-1])

    def test_quiet_shows_nothing(self) -> None:
        self.assertEqual([], self.lines(BUSY, quiet=True))

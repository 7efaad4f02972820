# SPDX-License-Identifier: Apache-2.0
"""The history of migrations: whole files, broken ones, several writers."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.migration.history import History
from nova_dmigrate.migration.summary import new_id
from nova_dmigrate.retention import Retention
from tests import base
from tests.unit.migration.summaries import ORDINARY, RELAYED, series

# Adds so many summaries of a size that no file system writes at once, and prints their ids
_WRITER = textwrap.dedent("""
    import dataclasses, sys
    from pathlib import Path
    from nova_dmigrate.migration.history import History
    from nova_dmigrate.migration.summary import new_id
    from tests.unit.migration.summaries import RELAYED, series

    history = History(Path(sys.argv[1]))
    full = dataclasses.replace(RELAYED, series={"source": tuple(series(int(sys.argv[3])))})
    for _ in range(int(sys.argv[2])):
        summary = dataclasses.replace(full, id=new_id())
        history.add(summary)
        print(summary.id, flush=True)
""")


class HistoryTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory() / "made" / "when needed"
        self.history = History(self.directory)

    def refusal(self, identifier: str) -> str:
        return str(self.assertRaises(exception.HistoryError, self.history.get, identifier))

    def writer(self, count: int, seconds: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(self.directory), str(count), str(seconds)],
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_what_was_added_is_there_newest_first(self) -> None:
        self.assertEqual((), self.history.list())
        full = dataclasses.replace(RELAYED, series={"source": tuple(series())})
        self.history.add(ORDINARY)
        path = self.history.add(full)
        self.assertEqual(self.directory / f"{RELAYED.id}.json", path)
        self.assertEqual((ORDINARY, full), self.history.list())
        self.assertEqual((ORDINARY,), self.history.list(limit=1))
        self.assertEqual(full, self.history.get(RELAYED.id))
        self.assertEqual(2, len(os.listdir(self.directory)))

    def test_one_that_is_there_is_never_overwritten(self) -> None:
        self.history.add(RELAYED)
        other = dataclasses.replace(ORDINARY, id=RELAYED.id)
        error = self.assertRaises(exception.HistoryError, self.history.add, other)
        self.assertIn("already has", str(error))
        self.assertEqual(RELAYED, self.history.get(RELAYED.id))
        self.assertEqual(1, len(os.listdir(self.directory)))

    def test_what_cannot_be_written_leaves_nothing(self) -> None:
        for value in (float("nan"), object()):
            odd = dataclasses.replace(RELAYED, libvirt={"x": value})
            error = self.assertRaises(exception.HistoryError, self.history.add, odd)
            self.assertIn("cannot be written", str(error))
        self.assertEqual([], os.listdir(self.directory))

    def test_a_directory_that_cannot_be_is_told(self) -> None:
        file = self.make_directory() / "file"
        file.touch()
        history = History(file / "below")
        self.assertRaises(exception.HistoryError, history.add, RELAYED)
        self.assertRaises(exception.HistoryError, History(file).list)

    def test_what_is_not_there_is_told(self) -> None:
        self.assertIn("has no migration", self.refusal(RELAYED.id))
        for identifier in ("", "..", "../../etc/passwd", f"{RELAYED.id}.json"):
            self.assertIn("no id of a migration", self.refusal(identifier))

    def test_broken_files_are_left_out_with_a_warning_and_told_when_asked_for(self) -> None:
        whole = self.history.add(RELAYED).read_text()
        broken = {
            "20261125-170302-000001": "",
            "20261125-170302-000002": whole[: len(whole) // 2],
            "20261125-170302-000003": "[" * 200000,
            "20261125-170302-000004": "null",
            "20261125-170302-000005": whole,  # of another migration
            "20261125-170302-000006": whole.replace('"completed"', '"lost"'),
        }
        for identifier, text in broken.items():
            (self.directory / f"{identifier}.json").write_text(text)
        (self.directory / "20261125-170302-000007.json").write_bytes(b"\xff\xfe{}")
        (self.directory / "20261125-170302-000008.json").mkdir()
        (self.directory / "20261125-170302-000009.json").symlink_to("nowhere")
        (self.directory / "notes.json").write_text("not ours")
        self.assertEqual((RELAYED,), self.history.list())
        self.assertEqual((RELAYED,), self.history.list(limit=1))
        for number in range(1, 10):
            identifier = f"20261125-170302-00000{number}"
            self.assertIn(identifier, self.log.output)
            self.assertIn(identifier, self.refusal(identifier))
        self.assertNotIn("notes.json", self.log.output)

    def test_only_the_newest_are_kept(self) -> None:
        history = History(self.directory, Retention(count=3))
        added = [dataclasses.replace(RELAYED, id=f"20261125-17030{n}-abcdef") for n in range(6)]
        for number, summary in enumerate(added):
            os.utime(history.add(summary), (number, number))
        self.assertEqual(tuple(reversed(added[-3:])), history.list())
        self.assertEqual(3, len(os.listdir(self.directory)))

    def test_old_ones_go_when_another_one_comes(self) -> None:
        old = self.history.add(RELAYED)
        killed = self.directory / f".{RELAYED.id}.0123abcd.partial"
        killed.touch()
        other = self.directory / "notes.json"
        other.write_text("not ours")
        for path in (old, killed, other):
            os.utime(path, (time.time() - 3 * 86400,) * 2)
        new = History(self.directory, Retention(days=2)).add(ORDINARY)
        self.assertEqual({new.name, other.name}, set(os.listdir(self.directory)))

    def test_several_writers_lose_nothing_and_a_reader_sees_whole_files_only(self) -> None:
        writers = [self.writer(20, 20) for _ in range(3)]
        while any(each.poll() is None for each in writers):
            self.history.list()
        ids = [line for each in writers if each.stdout for line in each.stdout.read().split()]
        for each in writers:
            if each.stdout:
                each.stdout.close()
        self.assertEqual([0, 0, 0], [each.returncode for each in writers])
        self.assertEqual(60, len(set(ids)))
        self.assertEqual(set(ids), {each.id for each in self.history.list()})
        self.assertNotIn("left out", self.log.output)

    def test_a_writer_that_is_killed_leaves_whole_summaries_only(self) -> None:
        writer = self.writer(10000, 60)
        assert writer.stdout is not None
        told = [writer.stdout.readline().strip() for _ in range(3)]
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        there = {each.id for each in self.history.list()}
        self.assertTrue(set(told) <= there, set(told) - there)
        self.assertNotIn("left out", self.log.output)
        self.history.add(dataclasses.replace(RELAYED, id=new_id()))

# SPDX-License-Identifier: Apache-2.0
"""Lists of hot pages: their format, their order, and that a file of them is whole at any time."""

from __future__ import annotations

import io
import os
import pwd
import stat
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    hotlist,
    hotlist_file,
    hotlist_frames,
    location,
    options,
    processes,
)
from tests import base

NUMBER = st.integers(0, 2**32 - 1)


def keys(*pairs: tuple[int, int]) -> hotlist.U64:
    return np.array([(space << 32) | page for space, page in pairs], np.uint64)


def decode(text: bytes, limit: int = hotlist.MAX_PAGES) -> list[int]:
    return hotlist.decode(io.BytesIO(text), limit).tolist()  # type: ignore[no-any-return]


class FormatTest(base.TestCase):
    def test_it_is_the_servers_own(self) -> None:
        text = b"".join(hotlist.encode(keys((0, 7), (12, 0), (2**32 - 1, 2**32 - 1))))
        self.assertEqual(b"0,7\n12,0\n4294967295,4294967295\n", text)

    @settings(deadline=None)
    @given(st.lists(st.tuples(NUMBER, NUMBER), max_size=50))
    def test_what_is_written_is_what_is_read(self, pairs: list[tuple[int, int]]) -> None:
        pages = keys(*pairs)
        self.assertEqual(pages.tolist(), decode(b"".join(hotlist.encode(pages))))

    def test_long_lists_come_in_pieces_and_their_order_stays(self) -> None:
        pages = np.random.default_rng(1).permutation(200_000).astype(np.uint64)
        pieces = list(hotlist.encode(pages))
        self.assertGreater(len(pieces), 5)
        self.assertTrue(all(piece.endswith(b"\n") for piece in pieces))
        self.assertEqual(pages.tolist(), decode(b"".join(pieces)))
        self.assertEqual(pages[:100_001].tolist(), decode(b"".join(pieces), 100_001))

    def test_a_last_line_without_an_end_counts(self) -> None:
        self.assertEqual(keys((1, 2), (3, 4)).tolist(), decode(b"1,2\n3,4"))

    @settings(deadline=None)
    @given(st.binary(max_size=60))
    def test_anything_else_is_refused_and_raises_nothing_else(self, text: bytes) -> None:
        try:
            found = decode(text)
        except ValueError:
            return
        self.assertEqual(len(text.splitlines()), len(found))

    def test_what_is_no_list_is_refused(self) -> None:
        for text in (b"1;2\n", b"1,2,3\n", b"-1,2\n", b"4294967296,1\n", b"\0" * 100, b"1,2\n\n"):
            self.assertRaises(ValueError, decode, text)

    def test_the_lists_of_pool_instances_become_one(self) -> None:
        parts = keys((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2))
        ordered = hotlist.interleave(parts, 3)
        self.assertEqual(
            keys((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (1, 3), (2, 3)).tolist(),
            ordered.tolist(),
        )
        self.assertEqual(parts.tolist(), hotlist.interleave(parts, 1).tolist())
        self.assertEqual([], hotlist.interleave(keys(), 8).tolist())


class HistoryTest(base.TestCase):
    def look(self, *looks: list[int]) -> hotlist_frames.FrameHistory:
        history = hotlist_frames.FrameHistory(options.MapOptions(), 1.0)
        for found in looks:
            history.seen(np.array(found, np.uint64))
        return history

    def test_what_was_seen_most_often_in_a_row_is_the_hottest(self) -> None:
        history = self.look([1, 2, 3, 9], [2, 3, 4, 9], [1, 3, 4, 5])
        self.assertEqual([3, 4, 1, 5], history.hottest(10).tolist())
        self.assertEqual([3, 4], history.hottest(2).tolist())

    def test_looks_without_end_count_no_further(self) -> None:
        history = self.look(*([[1]] * 300), [1, 2])
        self.assertEqual([1, 2], history.hottest(10).tolist())

    def test_nothing_seen_is_nothing_hot(self) -> None:
        self.assertEqual([], self.look([1, 2], []).hottest(10).tolist())

    def test_places_lead_back_to_pages(self) -> None:
        files = [
            location.File(5, 0, 10, False, None),
            location.File(6, 0, 10, False, "compressed"),
            location.File(7, 0, 3, False, None),
            location.File(7, 3, 4, False, None),
            location.File(9, 0, 0, False, None),
        ]
        table = location.PlaceTable(files)
        space = np.array([5, 5, 7, 7, 7], np.uint32)
        page = np.array([0, 9, 0, 3, 6], np.uint32)
        _, place, _, _ = table.find(space, page)
        found = table.pages(place)
        expected = (space.astype(np.uint64) << np.uint64(32)) | page
        self.assertEqual(expected.tolist(), found.tolist())


class ListFileTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory()
        self.cancelled = cancellation.Cancellation("this work")

    def server(self, uid: int | None = None) -> processes.ServerProcess:
        return processes.ServerProcess(
            pid=os.getpid(),
            start_time=0,
            executable="",
            datadir=str(self.path),
            root=f"/proc/{os.getpid()}/root",
            socket=None,
            uid=os.getuid() if uid is None else uid,
        )

    def directory(self, uid: int | None = None) -> hotlist_file.ListDirectory:
        opened = hotlist_file.ListDirectory(self.server(uid), hotlist_file.Place())
        self.addCleanup(opened.__exit__)
        return opened

    def files(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def test_a_list_takes_the_place_of_another(self) -> None:
        directory = self.directory()
        self.assertEqual((0, None), (directory.lines(), directory.age()))
        for pages in (keys((1, 2)), keys((3, 4), (5, 6))):
            directory.replace(directory.name, pages, self.cancelled)
            self.assertEqual(pages.tolist(), directory.read(directory.name).tolist())
            self.assertEqual(["ib_buffer_pool"], self.files())
        self.assertEqual(2, directory.lines())
        self.assertEqual("3,4\n5,6\n", (self.path / "ib_buffer_pool").read_text())
        self.assertLess(abs(directory.age() or 99), 60)

    def test_it_is_the_servers_and_not_for_others(self) -> None:
        base.require(None if os.getuid() == 0 else "only root can act as the server's user")
        other = pwd.getpwnam("nobody").pw_uid
        os.chown(self.path, other, -1)
        self.addCleanup(os.umask, os.umask(0o077))
        directory = self.directory(other)
        directory.replace(directory.name, keys((1, 2)), self.cancelled)
        status = (self.path / "ib_buffer_pool").stat()
        self.assertEqual((other, os.getgid()), (status.st_uid, status.st_gid))
        self.assertEqual(0o640, stat.S_IMODE(status.st_mode))
        # The thread is root again
        (self.path / "ours").touch()
        self.assertEqual(0, (self.path / "ours").stat().st_uid)

    def test_where_the_server_may_not_write_the_agent_does_not_either(self) -> None:
        base.require(None if os.getuid() == 0 else "only root can act as the server's user")
        os.chmod(self.path, 0o755)
        directory = self.directory(pwd.getpwnam("nobody").pw_uid)
        error = self.assertRaises(
            exception.StorageError, directory.replace, directory.name, keys((1, 2)), self.cancelled
        )
        self.assertEqual("no-privilege", error.kwargs["code"])
        self.assertEqual([], self.files())

    def test_links_lead_nowhere(self) -> None:
        target = self.make_directory() / "target"
        target.write_text("precious")
        for name in ("ib_buffer_pool", "ib_buffer_pool.new"):
            (self.path / name).symlink_to(target)
        directory = self.directory()
        self.assertRaises(exception.StorageError, directory.read, directory.name)
        directory.replace(directory.name, keys((1, 2)), self.cancelled)
        self.assertEqual("precious", target.read_text())
        self.assertFalse((self.path / "ib_buffer_pool").is_symlink())

    def test_when_it_is_given_up_the_old_list_is_as_it_was(self) -> None:
        directory = self.directory()
        directory.replace(directory.name, keys((1, 2)), self.cancelled)
        many = np.arange(500_000, dtype=np.uint64)
        self.cancelled.cancel()
        self.assertRaises(
            exception.AgentError, directory.replace, directory.name, many, self.cancelled
        )
        wanted = cancellation.Cancellation()
        error = self.assertRaises(
            exception.AgentError,
            directory.replace,
            directory.name,
            keys((3, 4)),
            wanted,
            lambda: False,
        )
        self.assertEqual("ending", error.kwargs["code"])
        self.assertEqual(["ib_buffer_pool"], self.files())
        self.assertEqual(keys((1, 2)).tolist(), directory.read(directory.name).tolist())

    def test_a_list_that_would_leave_no_room_is_refused(self) -> None:
        directory = self.directory()
        directory.check_room(10)
        error = self.assertRaises(exception.StorageError, directory.check_room, 1 << 50)
        self.assertEqual("no-room", error.kwargs["code"])

    def test_only_plain_names_are_written(self) -> None:
        for name in ("/etc/passwd", "../x", "", ".x", "a/b", "a\nb", "x" * 200):
            error = self.assertRaises(exception.StorageError, hotlist_file.checked, name, "")
            self.assertEqual("unusual-name", error.kwargs["code"])

    def test_a_server_that_has_ended_has_no_place(self) -> None:
        server = processes.ServerProcess(2**22 + 1, 0, "", "/", "/", None, 0)
        self.assertRaises(exception.ServerNotFound, hotlist_file.place_of, server)

    def test_no_list_is_told_as_such(self) -> None:
        directory = self.directory()
        error = self.assertRaises(exception.StorageError, directory.read, directory.name)
        self.assertEqual("no-list", error.kwargs["code"])
        Path(self.path / "ib_buffer_pool").write_text("something else")
        error = self.assertRaises(exception.StorageError, directory.read, directory.name)
        self.assertEqual("no-list", error.kwargs["code"])

# SPDX-License-Identifier: Apache-2.0
"""What a relay tells of itself."""

import json
import socket
import stat
import threading
from pathlib import Path
from unittest import mock

from nova_dmigrate.relay import monitor
from nova_dmigrate.relay.monitor import ControlServer, Sampler, Stages, ask, write_summary
from tests.base import TestCase

LONG = 60.0


class ControlServerTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "control"
        self.cancelled = 0
        self.limits: list[tuple[float, float]] = []
        self.server = ControlServer(
            self.path,
            lambda: {"bytes": 5},
            self.cancel,
            lambda *rates: self.limits.append(rates),
        )
        self.addCleanup(self.server.close)

    def cancel(self) -> bool:
        self.cancelled += 1
        return self.cancelled == 1

    def say(self, line: bytes) -> dict[str, object]:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(LONG)
            peer.connect(str(self.path))
            peer.sendall(line)
            with peer.makefile("rb") as answers:
                answer: dict[str, object] = json.loads(answers.readline())
        return answer

    def test_progress_is_told(self) -> None:
        self.assertEqual({"bytes": 5}, ask(self.path, "progress", LONG))

    def test_a_cancel_is_carried_out(self) -> None:
        self.assertEqual({"cancelled": True}, ask(self.path, "cancel", LONG))
        self.assertEqual({"cancelled": False}, ask(self.path, "cancel", LONG))
        self.assertEqual(2, self.cancelled)

    def test_limits_are_handed_on(self) -> None:
        answer = ask(self.path, "limit", LONG, network_bandwidth=5, volume_bandwidth=0.5)
        self.assertEqual({"limited": True}, answer)
        self.assertEqual([(5, 0.5)], self.limits)

    def test_limits_that_are_none_are_not(self) -> None:
        for values in (
            {},
            {"network_bandwidth": 1},
            {"network_bandwidth": 1, "volume_bandwidth": -1},
            {"network_bandwidth": True, "volume_bandwidth": 1},
            {"network_bandwidth": float("nan"), "volume_bandwidth": 1},
            {"network_bandwidth": float("inf"), "volume_bandwidth": 1},
            {"network_bandwidth": "1", "volume_bandwidth": 1},
        ):
            line = json.dumps({"command": "limit", **values}).encode() + b"\n"
            self.assertIn("error", self.say(line))
        self.assertEqual([], self.limits)

    def test_nonsense_is_answered_with_an_error_and_harms_nobody(self) -> None:
        for line in (
            b"\n",
            b"not JSON\n",
            b"[]\n",
            b"7\n",
            b'{"other": 1}\n',
            b'{"command": ["progress"]}\n',
            b'{"command": "dance"}\n',
            b"\xff\xfe\n",
            b"[" * 4000 + b"\n",
            b"x" * 10000 + b"\n",
        ):
            with self.subTest(line=line[:20]):
                try:
                    self.assertIn("error", self.say(line))
                except ConnectionError:
                    # What it has not read of too long a line resets the connection.
                    self.assertGreater(len(line), 4096)
        self.assertEqual({"bytes": 5}, ask(self.path, "progress", LONG))

    def test_who_says_nothing_does_not_hold_up_others_for_long(self) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(self.path))
            self.assertEqual({"bytes": 5}, ask(self.path, "progress", LONG))

    def test_who_goes_away_harms_nobody(self) -> None:
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(self.path))
                peer.sendall(b'{"command": "progress"}\n')
        self.assertEqual({"bytes": 5}, ask(self.path, "progress", LONG))

    def test_only_the_owner_may_connect(self) -> None:
        self.assertEqual(0o600, stat.S_IMODE(self.path.stat().st_mode))

    def test_closing_removes_the_socket(self) -> None:
        self.server.close()
        self.assertFalse(self.path.exists())
        self.assertRaises(OSError, ask, self.path, "progress")

    def test_a_socket_that_was_left_behind_is_no_obstacle(self) -> None:
        path = self.path.with_name("old")
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(path))
        server = ControlServer(path, lambda: {}, self.cancel, lambda *rates: None)
        self.assertEqual({}, ask(path, "progress", LONG))
        server.close()

    def test_what_answers_must_be_a_relay(self) -> None:
        path = self.path.with_name("other")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()

            def answer() -> None:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(100)
                    peer.sendall(b"[1]\n")

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            self.assertRaises(ValueError, ask, path, "progress", LONG)
            thread.join(LONG)


class SamplerTest(TestCase):
    def sample(self, count: int) -> list[dict[str, object]]:
        """The series of ``count`` samples."""
        taken: list[int] = []
        done = threading.Event()

        def sample(now: float) -> dict[str, object]:
            taken.append(1)
            if len(taken) >= count:
                done.set()
            return {"n": len(taken)}

        with mock.patch.object(monitor, "SAMPLE_RATE", 1e6):
            sampler = Sampler(sample)
            sampler.start()
            self.assertTrue(done.wait(LONG))
            return sampler.stop()

    def test_rows_come_with_their_time(self) -> None:
        rows = self.sample(5)
        self.assertEqual([1, 2, 3, 4, 5], [row["n"] for row in rows[:5]])
        times = [float(str(row["t"])) for row in rows]
        self.assertEqual(sorted(times), times)

    def test_a_long_series_is_thinned_evenly(self) -> None:
        with mock.patch.object(monitor, "_SERIES_LIMIT", 20):
            rows = self.sample(300)
        self.assertLessEqual(len(rows), 20)
        self.assertGreaterEqual(len(rows), 10)
        steps = {int(str(b["n"])) - int(str(a["n"])) for a, b in zip(rows, rows[1:], strict=False)}
        self.assertEqual(1, len(steps))
        self.assertGreaterEqual(steps.pop(), 16)

    def test_who_has_not_begun_can_stop(self) -> None:
        self.assertEqual([], Sampler(lambda now: {}).stop())


class StagesTest(TestCase):
    def test_the_time_of_a_stage_that_comes_back_adds_up(self) -> None:
        now = 10.0
        with mock.patch("nova_dmigrate.relay.monitor.time.monotonic", lambda: now):
            stages = Stages("a")
            for stage, seconds in (("b", 1.0), ("a", 2.0), ("a", 3.0), ("c", 4.0)):
                now += seconds
                stages.enter(stage)
            now += 5.0
            self.assertEqual({"a": 8.0, "b": 2.0, "c": 5.0}, stages.seconds())
        self.assertEqual("c", stages.current)


class SummaryTest(TestCase):
    def test_a_summary_is_whole_and_leaves_nothing_else(self) -> None:
        path = self.make_directory() / "summary.json"
        path.write_text("an older one")
        write_summary(path, {"state": "delivered", "series": []})
        self.assertEqual({"state": "delivered", "series": []}, json.loads(path.read_text()))
        self.assertEqual([path], list(path.parent.iterdir()))

    def test_a_summary_that_cannot_be_written_is_logged(self) -> None:
        write_summary(Path("/does/not/exist/summary.json"), {})
        self.assertIn("The summary cannot be written", self.log.output)

# SPDX-License-Identifier: Apache-2.0
"""What a service knows of its predecessor."""

import configparser
import dataclasses
import json
import os
import pwd
import stat
import subprocess
import sys
import time
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.host.relays import Identity, RelayFiles, RelayProcess, read_events, read_summary
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.retention import Retention
from tests import base

LONG = 60.0
RECORD = Record("s", "m", "i", "source", {"token": "x"}, "/run/q", None, 0, 0, 30, 0, 5.0)


class StoreTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        # As in the unit
        self.addCleanup(os.umask, os.umask(0o077))
        self.store = self.make()

    def make(self) -> Store:
        made = Store(self.directory / "state", self.directory / "run")
        self.addCleanup(made.close)
        return made

    def test_records_come_back_in_the_order_of_their_creation(self) -> None:
        later = dataclasses.replace(RECORD, session_id="a", created=6.0, pid=1, started="boot/1")
        for record in (later, RECORD):
            self.store.save(record)
        self.assertEqual([RECORD, later], self.store.load())
        self.assertEqual([None, Identity(1, "boot/1")], [each.identity for each in (RECORD, later)])
        self.store.remove(RECORD)
        self.assertEqual([later], self.store.load())

    def test_others_reach_their_own_directories_and_nothing_of_the_services(self) -> None:
        base.require(None if os.geteuid() == 0 else "only root can act as nova-compute's user")
        self.store.save(RECORD)
        self.directory.chmod(0o711)
        nobody = pwd.getpwnam("nobody")
        state = self.directory / "state"
        maps = state / "maps"
        maps.mkdir(mode=0o700)
        os.chown(maps, nobody.pw_uid, nobody.pw_gid)

        def carried_out(*command: str) -> bool:
            done = subprocess.run(
                command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], check=False
            )
            return done.returncode == 0

        self.assertTrue(carried_out("touch", str(maps / "one.map")))
        for letter, path in (("-r", state), ("-w", state), ("-x", state / "sessions")):
            self.assertFalse(carried_out("test", letter, str(path)), (letter, path))
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(Path(__file__).parents[3] / "etc/systemd/nova-dmigrate-host.service")
        mode = unit["Service"]["StateDirectoryMode"]
        self.assertEqual(int(mode, 8), stat.S_IMODE(state.stat().st_mode))

    def test_only_the_service_can_read_them(self) -> None:
        self.store.save(RECORD)
        (path,) = (self.directory / "state" / "sessions").iterdir()
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))

    def test_what_is_not_understood_is_removed(self) -> None:
        sessions = self.directory / "state" / "sessions"
        for number, text in enumerate((b"", b"{", b"[]", b"{}", b'{"session_id": 1}', b"\xff")):
            (sessions / f"{number}.json").write_bytes(text)
            (sessions / f"{number}.events").touch()
        (sessions / "s.events").touch()
        self.store.save(RECORD)
        self.assertEqual([RECORD], self.store.load())
        self.assertEqual({"s.json", "s.events"}, {path.name for path in sessions.iterdir()})

    def test_what_a_later_version_has_noted_beside_is_ignored(self) -> None:
        self.store.save(RECORD)
        (path,) = (self.directory / "state" / "sessions").iterdir()
        path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
        self.assertEqual([RECORD], self.store.load())
        self.assertTrue(path.exists())

    def test_one_service_has_them_at_a_time(self) -> None:
        self.assertRaises(exception.ConfigurationError, self.make)

    def test_a_directory_that_cannot_be_made_is_a_wrong_configuration(self) -> None:
        (self.directory / "file").touch()
        error = self.assertRaises(
            exception.ConfigurationError, Store, self.directory / "file" / "x", self.directory
        )
        self.assertIn("directories", str(error))

    def test_old_summaries_are_removed(self) -> None:
        old, fresh = (self.store.files(name).summary for name in ("old", "fresh"))
        for path in (old, fresh):
            path.write_text("{}")
        os.utime(old, (time.time() - 3 * 86400,) * 2)
        self.store.prune(Retention(days=2))
        self.assertEqual((False, True), (old.exists(), fresh.exists()))


class RelayProcessTest(base.TestCase):
    """With a program that stands for a relay: what matters is the process."""

    def setUp(self) -> None:
        super().setUp()
        here = self.make_directory()
        self.files = RelayFiles(here / "events", here / "control", here / "summary")
        self.noted: list[Identity] = []

    def spawn(self, program: str) -> RelayProcess:
        return RelayProcess.spawn(
            [sys.executable, "-c", program], {"a": 1}, self.files, self.noted.append
        )

    def test_it_is_told_what_to_do_and_tells_its_events(self) -> None:
        made = self.spawn("import sys; print(sys.stdin.read())")
        self.assertTrue(made.wait(LONG))
        made.bury()
        self.assertEqual([{"a": 1}], read_events(self.files.events))
        self.assertFalse(Path(f"/proc/{self.noted[0].pid}").exists())

    def test_it_has_a_session_of_its_own_and_can_be_adopted(self) -> None:
        made = self.spawn("import sys, time; sys.stdin.read(); time.sleep(1000)")
        pid = self.noted[0].pid
        self.assertEqual(pid, os.getsid(pid))
        adopted = RelayProcess.adopt(self.noted[0], self.files)
        assert adopted is not None
        self.assertTrue(adopted.alive())
        self.assertIsNone(adopted.ask("progress", 1))
        adopted.signal(9)
        self.assertTrue(adopted.wait(LONG))
        # A zombie, until its parent has noticed
        self.assertFalse(made.alive())
        made.bury()
        self.assertIsNone(RelayProcess.adopt(self.noted[0], self.files))
        adopted.signal(9)

    def test_another_process_of_the_same_number_is_not_taken_for_it(self) -> None:
        identity = Identity.of(os.getpid())
        assert identity is not None
        for other in ("boot/1", identity.started + "0", "x" + identity.started):
            self.assertIsNone(RelayProcess.adopt(Identity(os.getpid(), other), self.files))
        self.assertIsNotNone(RelayProcess.adopt(identity, self.files))

    def test_a_relay_that_cannot_be_noted_does_not_run(self) -> None:
        pids: list[int] = []

        def note(identity: Identity) -> None:
            pids.append(identity.pid)
            raise OSError("the disk is full")

        self.assertRaises(
            OSError, RelayProcess.spawn, [sys.executable, "-c", "input()"], {}, self.files, note
        )
        self.assertFalse(Path(f"/proc/{pids[0]}").exists())

    def test_one_that_ends_at_once_is_no_error(self) -> None:
        made = self.spawn("import os; os.close(0)")
        self.assertTrue(made.wait(LONG))
        made.bury()
        self.assertEqual([], read_events(self.files.events))

    def test_half_a_line_is_no_event_yet(self) -> None:
        self.files.events.write_bytes(b'{"event": "ready"}\nnonsense\n[1]\n{"event": "e')
        self.assertEqual([{"event": "ready"}], read_events(self.files.events))
        self.assertEqual([], read_events(self.files.control))

    def test_a_summary_is_told_without_its_series(self) -> None:
        self.files.summary.write_text('{"state": "delivered", "series": [1]}')
        self.assertEqual({"state": "delivered"}, read_summary(self.files.summary))
        for text in ("", "{", "[]"):
            self.files.summary.write_text(text)
            self.assertIsNone(read_summary(self.files.summary))

    def test_a_relay_of_an_earlier_session_has_left_no_summary(self) -> None:
        self.files.summary.write_text("{}")
        made = self.spawn("")
        self.assertTrue(made.wait(LONG))
        made.bury()
        self.assertFalse(self.files.summary.exists())

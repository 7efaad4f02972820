# SPDX-License-Identifier: Apache-2.0
"""Preparation: what is changed, and that it is put back whatever happens."""

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.agent import flushing, ledger
from nova_dmigrate.agent.database import Login
from nova_dmigrate.agent.preparation import Preparation, PreparationSettings
from nova_dmigrate.rpc.messages import PrepareArguments
from tests import base
from tests.unit.agent.fakes import DEFAULTS, FakeGuest, FakeServer, Killed


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


class PreparationTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "state" / "preparation.json"
        self.clock = Clock()
        self.server = FakeServer()
        self.guest = FakeGuest(self.server)
        self.before = dict(self.server.values)

    def make(self, boot_id: str = "this-boot", **values: Any) -> Preparation:
        preparation = Preparation(
            ledger.LedgerFile(self.path),
            self.guest.logins,
            Login,
            self.guest.connect,  # type: ignore[arg-type]
            PreparationSettings(**values),
            self.clock,
            boot_id,
        )
        preparation.recover()
        return preparation

    def assert_restored(self) -> None:
        self.assertEqual(self.before, self.server.values)
        self.assertEqual([], list(self.path.parent.iterdir()))
        self.assertEqual(0, self.server.connections)

    def add_server(self) -> FakeServer:
        other = FakeServer(socket="/run/other.sock")
        self.guest.servers.append(other)
        return other

    def pretend_that_an_earlier_process_had_the_pid(self) -> None:
        """The ledger speaks of a process with that number, but another start."""
        content = json.loads(self.path.read_text())
        for entry in content["entries"]:
            entry["identity"]["start_time"] -= 1
        self.path.write_text(json.dumps(content))


class LeaseTest(PreparationTestCase):
    def test_every_flavour_flushes_and_is_restored_exactly(self) -> None:
        for flavour, version in DEFAULTS:
            with self.subTest(flavour=flavour, version=version):
                self.server = FakeServer(flavour, version)
                self.guest.servers = [self.server]
                self.before = dict(self.server.values)
                preparation = self.make()
                state = preparation.prepare(PrepareArguments(seconds=1))
                self.assertEqual("flushing", state.state)
                self.assertEqual(0, float(self.server.values[flushing.HIGH_WATER]))
                self.assertEqual(0, float(self.server.values[flushing.LOW_WATER]))
                self.assertGreaterEqual(int(self.server.values[flushing.CAPACITY]), 625)
                self.assertEqual("100", self.server.values.get(flushing.IDLE, "100"))
                self.assertEqual("idle", preparation.restore(state.lease_id).state)
                self.assert_restored()

    def test_the_rate_is_bounded_and_never_below_the_servers_own(self) -> None:
        preparation = self.make(max_flush_bytes=300 * 16384)
        preparation.prepare(PrepareArguments(seconds=1))
        self.assertEqual("300", self.server.values[flushing.CAPACITY])
        self.assertEqual("2000", self.server.values[flushing.CAPACITY_MAX])
        slow = self.make(max_flush_bytes=16384)
        slow.restore()
        slow.prepare(PrepareArguments(seconds=1))
        self.assertEqual("200", self.server.values[flushing.CAPACITY])

    def test_it_is_ready_when_the_share_is_reached_or_the_time_is_over(self) -> None:
        preparation = self.make()
        arguments = PrepareArguments(dirty_share=0.1, seconds=10, lease_seconds=60)
        lease = preparation.prepare(arguments).lease_id
        self.server.dirty = 101
        self.assertEqual("flushing", preparation.renew(lease, 60).state)
        self.server.dirty = 100
        state = preparation.renew(lease, 60)
        self.assertEqual(("ready", True, 0.1), (state.state, state.reached, state.dirty_share))
        self.server.dirty = 900
        self.clock.now += 10
        state = preparation.renew(lease, 60)
        self.assertEqual(("ready", False), (state.state, state.reached))

    def test_a_lease_ends_when_nobody_renews_it(self) -> None:
        preparation = self.make()
        lease = preparation.prepare(PrepareArguments(lease_seconds=60)).lease_id
        self.clock.now += 59
        preparation.tick()
        preparation.renew(lease, 60)
        self.clock.now += 59
        preparation.tick()
        self.assertNotEqual(self.before, self.server.values)
        self.clock.now += 1
        preparation.tick()
        self.assert_restored()

    def test_a_lease_that_has_ended_cannot_be_renewed_even_before_the_tick(self) -> None:
        preparation = self.make()
        lease = preparation.prepare(PrepareArguments(lease_seconds=60)).lease_id
        self.clock.now += 60
        error = self.assertRaises(exception.AgentError, preparation.renew, lease, 60)
        self.assertEqual("unknown-lease", error.kwargs["code"])

    def test_a_lease_is_never_longer_than_allowed(self) -> None:
        preparation = self.make(max_lease_seconds=30)
        self.assertEqual(30, preparation.prepare(PrepareArguments(lease_seconds=3600)).remaining)

    def test_no_renewing_and_no_taking_over_holds_settings_longer_than_allowed(self) -> None:
        for ask_again in ("renew", "prepare"):
            preparation = self.make(max_seconds=100)
            state = preparation.prepare(PrepareArguments(lease_seconds=60))
            self.clock.now += 50
            if ask_again == "renew":
                state = preparation.renew(state.lease_id, 60)
            else:
                state = preparation.prepare(PrepareArguments(lease_seconds=60))
            self.assertEqual(50, state.remaining)
            self.clock.now += 49
            preparation.tick()
            self.assertNotEqual(self.before, self.server.values)
            self.clock.now += 1
            error = self.assertRaises(exception.AgentError, preparation.renew, state.lease_id, 60)
            self.assertEqual("unknown-lease", error.kwargs["code"])
            self.make(max_seconds=100).tick()
            self.assert_restored()

    def test_a_lease_that_has_ended_is_restored_before_the_next_preparation(self) -> None:
        preparation = self.make(max_seconds=100)
        preparation.prepare(PrepareArguments(seconds=1, lease_seconds=100))
        self.clock.now += 100
        changes = len(self.server.changes)
        state = preparation.prepare(PrepareArguments(seconds=1, lease_seconds=100))
        self.assertEqual(100, state.remaining)
        self.assertIn(
            (flushing.HIGH_WATER, self.before[flushing.HIGH_WATER]), self.server.changes[changes:]
        )
        preparation.restore()
        self.assert_restored()

    def test_a_second_requester_takes_over_and_the_first_values_are_remembered(self) -> None:
        preparation = self.make()
        first = preparation.prepare(PrepareArguments(seconds=1)).lease_id
        self.server.dirty = 0
        second = preparation.prepare(PrepareArguments(seconds=100)).lease_id
        self.assertEqual("idle", preparation.restore(first).state)
        self.assertNotEqual(self.before, self.server.values)
        self.assertRaises(exception.AgentError, preparation.renew, first, 60)
        preparation.restore(second)
        self.assert_restored()

    def test_restoring_twice_is_harmless(self) -> None:
        preparation = self.make()
        lease = preparation.prepare(PrepareArguments()).lease_id
        preparation.restore(lease)
        self.server.values[flushing.HIGH_WATER] = "0.000000"
        preparation.restore(lease)
        preparation.restore()
        self.assertEqual("0.000000", self.server.values[flushing.HIGH_WATER])

    def test_several_servers_are_prepared_and_restored_together(self) -> None:
        other = FakeServer("mariadb", (11, 8, 2), "/run/other.sock")
        before = dict(other.values)
        self.guest.servers.append(other)
        preparation = self.make()
        other.dirty = 0
        state = preparation.prepare(PrepareArguments())
        self.assertEqual(0.25, state.dirty_share)
        self.assertNotEqual(before, other.values)
        preparation.restore(state.lease_id)
        self.assertEqual(before, other.values)
        self.assert_restored()

    def test_a_server_that_is_down_does_not_keep_the_others_from_being_prepared(self) -> None:
        other = FakeServer(socket="/run/other.sock")
        other.down = True
        self.guest.servers.append(other)
        state = self.make().prepare(PrepareArguments())
        self.assertIn("/run/other.sock", state.message)
        self.assertNotEqual(self.before, self.server.values)

    def test_a_server_that_cannot_be_reached_keeps_its_first_values_in_a_second_preparation(
        self,
    ) -> None:
        other = self.add_server()
        preparation = self.make()
        preparation.prepare(PrepareArguments())
        self.server.down = True
        lease = preparation.prepare(PrepareArguments()).lease_id
        self.server.down = False
        self.assertEqual("idle", preparation.restore(lease).state)
        self.assertEqual(self.before, other.values)
        self.assert_restored()

    def test_once_closed_all_is_restored_and_nothing_is_prepared(self) -> None:
        preparation = self.make()
        lease = preparation.prepare(PrepareArguments()).lease_id
        preparation.close()
        self.assert_restored()
        error = self.assertRaises(exception.AgentError, preparation.prepare, PrepareArguments())
        self.assertEqual("stopping", error.kwargs["code"])
        self.assertRaises(exception.AgentError, preparation.renew, lease, 60)
        self.assert_restored()

    def test_without_a_server_nothing_is_prepared(self) -> None:
        self.guest.servers.clear()
        preparation = self.make()
        self.assertRaises(exception.ServerNotFound, preparation.prepare, PrepareArguments())
        self.assertFalse(self.path.exists())


class TroubleTest(PreparationTestCase):
    def test_the_ledger_is_written_before_the_first_change(self) -> None:
        self.server.crash_at = 0
        self.assertRaises(Killed, self.make().prepare, PrepareArguments(seconds=1))
        self.assertEqual([], self.server.changes)
        (entry,) = json.loads(self.path.read_text())["entries"]
        originals = {change["name"]: change["original"] for change in entry["changes"]}
        self.assertEqual({name: self.before[name] for name in originals}, originals)
        self.assertIn(flushing.HIGH_WATER, originals)

    def test_an_agent_killed_at_any_change_is_succeeded_by_one_that_restores(self) -> None:
        for step in range(3):
            self.server.crash_at = step
            self.assertRaises(Killed, self.make().prepare, PrepareArguments(seconds=1))
            self.assertEqual(step, len(self.server.changes))
            self.server.crash_at = None
            self.server.connections = 0
            self.make().tick()
            self.assert_restored()
            self.server.changes.clear()

    def test_an_agent_killed_while_restoring_is_succeeded_by_one_that_goes_on(self) -> None:
        for step in range(3):
            preparation = self.make()
            preparation.prepare(PrepareArguments(seconds=1))
            self.server.crash_at = len(self.server.changes) + step
            self.assertRaises(Killed, preparation.restore)
            self.server.crash_at = None
            self.server.connections = 0
            self.make().restore()
            self.assert_restored()

    def test_a_successor_goes_on_with_the_lease(self) -> None:
        lease = self.make().prepare(PrepareArguments(lease_seconds=60)).lease_id
        successor = self.make()
        successor.tick()
        self.assertEqual(lease, successor.renew(lease, 60).lease_id)
        self.clock.now += 60
        self.make().tick()
        self.assert_restored()

    def test_after_a_restart_of_the_guest_nothing_is_restored(self) -> None:
        self.make().prepare(PrepareArguments())
        after = dict(self.server.values)
        self.make(boot_id="next-boot").tick()
        self.assertEqual(after, self.server.values)
        self.assertFalse(self.path.exists())

    def test_nothing_is_restored_over_a_restarted_servers_own_settings(self) -> None:
        for pid_is_seen in (True, False):
            self.server = FakeServer()
            self.guest.servers = [self.server]
            if not pid_is_seen:
                self.server.pid = None
            preparation = self.make()
            preparation.prepare(PrepareArguments())
            self.server.restart()
            if not pid_is_seen:
                self.server.pid = None
            self.clock.now += 40
            self.server.values[flushing.HIGH_WATER] = "0.000000"
            preparation.restore()
            self.assertEqual("0.000000", self.server.values[flushing.HIGH_WATER])
            self.assertFalse(preparation.active)

    def test_a_server_of_which_only_the_uptime_is_known_is_restored(self) -> None:
        self.server.pid = None
        preparation = self.make()
        preparation.prepare(PrepareArguments())
        self.clock.now += 500
        self.server.uptime += 499
        preparation.restore()
        self.assert_restored()

    def test_what_somebody_else_has_set_stays_and_is_told(self) -> None:
        preparation = self.make()
        preparation.prepare(PrepareArguments(seconds=1))
        self.server.values[flushing.HIGH_WATER] = "33.000000"
        preparation.restore()
        self.assertEqual("33.000000", self.server.values[flushing.HIGH_WATER])
        self.assertEqual(self.before[flushing.CAPACITY], self.server.values[flushing.CAPACITY])
        self.assertIn("33.000000", self.log.output)

    def test_a_server_that_refuses_is_left_as_it_was(self) -> None:
        self.server.refuses.add(flushing.HIGH_WATER)
        preparation = self.make()
        error = self.assertRaises(
            exception.ServerError, preparation.prepare, PrepareArguments(seconds=1)
        )
        self.assertEqual("privilege", error.kwargs["code"])
        self.assert_restored()

    def test_a_server_that_refuses_is_no_trouble_of_the_others(self) -> None:
        other = FakeServer("mariadb", (11, 8, 2), "/run/other.sock")
        theirs = dict(other.values)
        self.guest.servers = [other, self.server]
        other.refuses.add(flushing.HIGH_WATER)
        preparation = self.make()
        state = preparation.prepare(PrepareArguments(seconds=1))
        self.assertIn("SUPER is needed", state.message)
        self.assertNotEqual([], other.changes)
        self.assertEqual(theirs, other.values)
        self.assertEqual(0, float(self.server.values[flushing.HIGH_WATER]))
        # Once it allows changes, it is prepared and restored with the others
        other.refuses.clear()
        preparation.prepare(PrepareArguments(seconds=1))
        self.assertEqual(0, float(other.values[flushing.HIGH_WATER]))
        self.assertEqual("idle", preparation.restore().state)
        self.assertEqual(theirs, other.values)
        self.assert_restored()

    def test_a_server_that_cannot_be_reached_is_restored_when_it_can(self) -> None:
        preparation = self.make()
        lease = preparation.prepare(PrepareArguments()).lease_id
        self.server.down = True
        state = preparation.restore(lease)
        self.assertEqual("restoring", state.state)
        self.assertIn("refused", state.message)
        self.make().tick()
        self.assertTrue(self.path.exists())
        self.server.down = False
        preparation.tick()
        self.assert_restored()

    def test_another_process_with_the_same_number_is_another_run(self) -> None:
        self.make().prepare(PrepareArguments())
        self.pretend_that_an_earlier_process_had_the_pid()
        changes = list(self.server.changes)
        successor = self.make()
        successor.restore()
        self.assertEqual(changes, self.server.changes)
        self.assertFalse(successor.active)

    def test_a_server_whose_number_another_process_has_now_is_not_waited_for(self) -> None:
        self.make().prepare(PrepareArguments())
        self.server.down = True
        successor = self.make()
        self.assertEqual("restoring", successor.restore().state)
        self.pretend_that_an_earlier_process_had_the_pid()
        successor = self.make()
        self.assertEqual("idle", successor.restore().state)
        self.assertFalse(successor.active)

    def test_an_ended_lease_is_restored_though_servers_cannot_be_looked_for(self) -> None:
        preparation = self.make()
        preparation.prepare(PrepareArguments(lease_seconds=60))

        def logins() -> list[Login]:
            return [Login(os.readlink("/proc/self/exe/no-directory"))]

        preparation._logins = logins
        self.assertRaises(OSError, preparation.prepare, PrepareArguments())
        self.clock.now += 60
        preparation.tick()
        self.assert_restored()

    def test_a_server_at_which_the_system_fails_keeps_no_other_from_anything(self) -> None:
        other = self.add_server()
        before = dict(other.values)
        preparation = self.make()

        def connect(login: Login) -> Any:
            if login.socket == self.server.socket:
                os.stat("/proc/self/exe/no-directory")
            return self.guest.connect(login)

        preparation._connect = connect
        state = preparation.prepare(PrepareArguments())
        self.assertIn(self.server.socket, state.message)
        self.assertNotEqual(before, other.values)
        preparation.restore(state.lease_id)
        self.assertEqual(before, other.values)

        preparation._connect = self.guest.connect  # type: ignore[assignment]
        lease = preparation.prepare(PrepareArguments()).lease_id
        preparation._connect = connect
        self.assertIn("Not a directory", preparation.renew(lease, 60).message)
        self.assertEqual("restoring", preparation.restore(lease).state)
        self.assertEqual(before, other.values)
        preparation._connect = self.guest.connect  # type: ignore[assignment]
        preparation.tick()
        self.assert_restored()

    def test_nothing_stays_changed_when_the_ledger_cannot_be_written(self) -> None:
        preparation = self.make()
        preparation.prepare(PrepareArguments())
        preparation.restore()
        (self.path.parent / "preparation.json.new").mkdir()
        self.assertRaises(OSError, preparation.prepare, PrepareArguments())
        self.assertEqual(self.before, self.server.values)
        self.assertFalse(preparation.active)

    def test_while_a_ledger_is_lost_nothing_is_prepared_and_restoring_fails(self) -> None:
        self.make().prepare(PrepareArguments())
        lowered = dict(self.server.values)
        for path in self.path.parent.iterdir():
            os.truncate(path, 40)
        preparation = self.make()
        self.assertFalse(preparation.active)
        (finding,) = preparation.findings()
        self.assertEqual("lost-ledger", finding.code)
        lost = list(self.path.parent.iterdir())
        for again in (preparation, self.make()):
            for call in (
                lambda: again.prepare(PrepareArguments()),  # noqa: B023
                lambda: again.restore(),  # noqa: B023
                lambda: again.restore("a-lease"),  # noqa: B023
            ):
                error = self.assertRaises(exception.AgentError, call)
                self.assertEqual("lost-ledger", error.kwargs["code"])
                for path in lost:
                    self.assertIn(str(path), str(error))
            again.close()
        self.assertEqual(lowered, self.server.values)

        self.server.values.update(self.before)
        for path in lost:
            path.unlink()
        preparation = self.make()
        self.assertEqual([], preparation.findings())
        preparation.prepare(PrepareArguments())
        preparation.restore()
        self.assert_restored()


class HistoryTest(base.TestCase):
    """Any order of events ends with the original settings."""

    @settings(deadline=None, derandomize=True, max_examples=120)
    @given(
        st.sampled_from(sorted(DEFAULTS)),
        st.lists(
            st.one_of(
                st.tuples(st.just("prepare"), st.floats(1, 100)),
                st.tuples(st.just("dirty"), st.integers(0, 1000)),
                st.tuples(st.just("crash"), st.integers(0, 5)),
                st.tuples(st.just("down"), st.booleans()),
                st.tuples(st.sampled_from(["renew", "restore", "tick", "wait"]), st.none()),
            ),
            max_size=12,
        ),
    )
    def test_all_settings_are_as_before_in_the_end(
        self, kind: tuple[str, tuple[int, int, int]], events: list[tuple[str, Any]]
    ) -> None:
        server = FakeServer(*kind)
        before = dict(server.values)
        guest = FakeGuest(server)
        clock = Clock()
        path = Path(self.make_directory()) / "preparation.json"

        def make() -> Preparation:
            made = Preparation(
                ledger.LedgerFile(path),
                guest.logins,
                Login,
                guest.connect,  # type: ignore[arg-type]
                None,
                clock,
                "boot",
            )
            made.recover()
            return made

        preparation, lease = make(), "none"
        for event, value in events:
            clock.now += 7
            try:
                if event == "prepare":
                    lease = preparation.prepare(PrepareArguments(seconds=value)).lease_id
                elif event == "dirty":
                    server.dirty = value
                elif event == "crash":
                    server.crash_at = len(server.changes) + value
                elif event == "down":
                    server.down = value
                elif event == "renew":
                    preparation.renew(lease, 60)
                elif event == "restore":
                    preparation.restore(lease)
                elif event == "tick":
                    preparation.tick()
                else:
                    clock.now += 60
            except exception.AgentError:
                continue
            except Killed:
                server.crash_at = None
                preparation = make()
        server.crash_at, server.down = None, False
        clock.now += 10000
        preparation.tick()
        self.assertEqual(before, server.values)
        self.assertFalse(path.exists())

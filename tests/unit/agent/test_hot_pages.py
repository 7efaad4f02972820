# SPDX-License-Identifier: Apache-2.0
"""Keeping lists of hot pages and filling pools from them, with a server that does as it is told."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    changes,
    flushing,
    hot_pages,
    hotlist,
    hotlist_keeper,
    hotlist_server,
    ledger,
    options,
    turns,
    warm_up,
)
from tests import base
from tests.unit.agent import pools
from tests.unit.agent.pools import PoolServer

PAGES = [(3, number) for number in (500, 20, 9, 300, 77, 41, 6, 8)]


def write_list(directory: Path, pages: list[tuple[int, int]]) -> Path:
    path = directory / "ib_buffer_pool"
    path.write_text("".join(f"{space},{page}\n" for space, page in pages))
    return path


def read_list(directory: Path) -> list[tuple[int, int]]:
    lines = (directory / "ib_buffer_pool").read_text().splitlines()
    return [(int(space), int(page)) for space, page in (line.split(",") for line in lines)]


class PoolTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.state = self.make_directory()
        self.data = self.make_directory()
        self.server = PoolServer(self.data)
        self.cancelled = cancellation.Cancellation("this work")
        # The pretended server does not tell time
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_APART", 0.0))
        self.useFixture(fixtures.MockPatchObject(warm_up, "_LOOK_SECONDS", 0.01))

    def borrowed(self) -> changes.Borrowed:
        made = changes.Borrowed(
            ledger.LedgerFile(self.state / "hot-pages.json"),
            hotlist_server.NAMES,
            self.server.login_at,
            self.server.connect,
            "this-boot",
        )
        made.recover()
        return made

    def assert_put_back(self) -> None:
        self.assertEqual(pools.DEFAULTS, self.server.values)
        self.assertEqual([], list(self.state.glob("hot-pages*")))
        self.assertEqual(["ib_buffer_pool"], sorted(path.name for path in self.data.iterdir()))


class KeeperTest(PoolTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.runs_for(1000.0)

    def runs_for(self, seconds: float) -> None:
        now = self.server.process.start_time / os.sysconf("SC_CLK_TCK") + seconds
        self.useFixture(fixtures.MockPatchObject(changes, "boot_clock", lambda: now))

    def keeper(self, **values: Any) -> hotlist_keeper.Keeper:
        settings = hotlist_keeper.ListSettings(**{"interval": 100.0, "share": 1.0, **values})
        return hotlist_keeper.Keeper(
            self.server, self.server.connect, self.borrowed(), settings, options.MapOptions()
        )

    def age(self, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(self.data / "ib_buffer_pool", (then, then))

    def test_the_servers_dump_becomes_the_list_in_its_order(self) -> None:
        self.server.in_pool = PAGES
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_a_server_with_a_fixed_name_dumps_under_it_while_the_list_is_kept(self) -> None:
        self.server.name_is_fixed = True
        self.server.in_pool = PAGES
        for _ in range(2):
            self.keeper().keep(self.cancelled)
            self.assertEqual(PAGES, read_list(self.data))
            self.assert_put_back()
            self.age(1000)
        self.server.fails_dump = "Cannot open it"
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_a_list_that_a_killed_agent_has_put_aside_comes_back(self) -> None:
        write_list(self.data, PAGES).rename(self.data / "ib_buffer_pool.dmigrate-saved")
        write_list(self.data, PAGES[:2])
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_the_share_bounds_the_list(self) -> None:
        self.server.in_pool = PAGES
        self.keeper(share=0.5).keep(self.cancelled)
        self.assertEqual(PAGES[:4], read_list(self.data))

    def test_the_lists_of_instances_are_merged(self) -> None:
        self.server.in_pool = PAGES
        self.server.values[hotlist_server.INSTANCES] = "2"
        self.server.instances = 2
        self.keeper().keep(self.cancelled)
        self.assertEqual([PAGES[0], PAGES[4], PAGES[1], PAGES[5]], read_list(self.data)[:4])

    def test_mariadb_has_one_instance_whatever_it_shows(self) -> None:
        self.server.in_pool = PAGES
        self.server.flavour = "mariadb"
        self.server.values[hotlist_server.INSTANCES] = "2"
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))

    def test_what_is_too_much_for_a_list_leaves_out_the_coldest_of_each_instance(self) -> None:
        self.useFixture(fixtures.MockPatchObject(hotlist, "MAX_PAGES", 4))
        self.server.in_pool = PAGES
        self.server.total = 8
        self.server.values[hotlist_server.INSTANCES] = "2"
        self.server.instances = 2
        self.keeper().keep(self.cancelled)
        self.assertEqual([PAGES[0], PAGES[4], PAGES[1], PAGES[5]], read_list(self.data))

    def test_the_share_bounds_the_list_of_a_server_that_dumps_all(self) -> None:
        self.server.in_pool = PAGES
        self.server.total = 8
        del self.server.values[hotlist_server.DUMP_SHARE]
        self.keeper(share=0.5).keep(self.cancelled)
        self.assertEqual(PAGES[:4], read_list(self.data))

    def test_a_recent_list_stays_until_the_interval_is_over(self) -> None:
        self.server.in_pool = PAGES
        write_list(self.data, PAGES[:5])
        self.age(50)
        self.keeper().keep(self.cancelled)
        self.assertEqual(0, self.server.dumps)
        self.age(101)
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))

    def test_an_interval_of_0_keeps_none(self) -> None:
        self.server.in_pool = PAGES
        self.keeper(interval=0.0).keep(self.cancelled)
        self.assertEqual([], list(self.data.iterdir()))

    def test_a_cold_pool_does_not_replace_the_list_of_a_warm_one(self) -> None:
        write_list(self.data, PAGES)
        self.age(1000)
        self.server.in_pool = PAGES[:3]
        self.keeper().keep(self.cancelled)
        self.assertEqual(1, self.server.dumps)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()
        self.runs_for(4000)
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES[:3], read_list(self.data))

    def test_what_crash_recovery_has_read_does_not_replace_the_list(self) -> None:
        write_list(self.data, PAGES)
        self.age(1000)
        self.server.in_pool = [(9, page) for page in range(20)]
        self.runs_for(20)
        keeper = self.keeper()
        keeper.keep(self.cancelled)
        self.assertEqual(0, self.server.dumps)
        self.assertEqual(PAGES, read_list(self.data))
        (due,) = keeper._next.values()
        self.assertAlmostEqual(80, due - time.monotonic(), delta=5)
        self.runs_for(101)
        self.keeper().keep(self.cancelled)
        self.assertEqual(self.server.in_pool, read_list(self.data))

    def test_a_young_server_without_a_list_gets_one(self) -> None:
        self.server.in_pool = PAGES
        self.runs_for(1)
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))

    def test_a_server_that_loads_is_not_asked(self) -> None:
        self.server.in_pool = PAGES
        self.server.own_load = True
        self.keeper().keep(self.cancelled)
        self.assertEqual(0, self.server.dumps)

    def test_a_server_that_is_ending_or_starting_is_left_alone(self) -> None:
        self.server.in_pool = PAGES
        self.server.process = dataclasses.replace(self.server.process, socket=None)
        self.keeper().keep(self.cancelled)
        self.assertEqual([], list(self.data.iterdir()))

    def test_a_server_that_has_closed_its_socket_meanwhile_keeps_its_old_list(self) -> None:
        self.server.in_pool = PAGES
        real = self.server.dump

        def dump() -> None:
            real()
            self.server.process = dataclasses.replace(self.server.process, socket=None)

        self.server.dump = dump  # type: ignore[method-assign]
        write_list(self.data, PAGES[:5])
        self.age(1000)
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES[:5], read_list(self.data))
        self.assertIn("ending", self.log.output)

    def test_a_dump_that_fails_is_told_once_and_nothing_is_left_changed(self) -> None:
        write_list(self.data, PAGES)
        self.age(1000)
        self.server.fails_dump = "Cannot open 'x.incomplete' for writing: No space left on device"
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_BEGIN_SECONDS", 0.2))
        keeper = self.keeper()
        for _ in range(2):
            keeper._next.clear()
            keeper._find_next = 0.0
            keeper.keep(self.cancelled)
        # The second time nothing shows that it has tried, and it is asked once more
        self.assertEqual(3, self.server.dumps)
        self.assertEqual(1, self.log.output.count("No space left"))
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_a_call_for_a_dump_that_a_server_misses_is_repeated(self) -> None:
        self.server.in_pool = PAGES
        self.server.status[hotlist_server.DUMP_STATUS] = "Buffer pool(s) dump completed at 12:00"
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_BEGIN_SECONDS", 0.1))
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_DUMP_SECONDS", 2.0))
        real, calls = self.server.dump, []

        def dump() -> None:
            calls.append(1)
            if len(calls) == 2:
                real()

        self.server.dump = dump  # type: ignore[method-assign]
        self.keeper().keep(self.cancelled)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_a_server_that_never_begins_to_dump_is_not_waited_for_long(self) -> None:
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_BEGIN_SECONDS", 0.1))
        self.useFixture(fixtures.MockPatchObject(hotlist_server, "_DUMP_SECONDS", 5.0))
        self.server.dump = lambda: None  # type: ignore[method-assign]
        for status in (
            "",
            "Dumping of buffer pool not started",
            "Buffer pool(s) dump completed at 12:00",
        ):
            self.server.status[hotlist_server.DUMP_STATUS] = status
            began = time.monotonic()
            self.keeper().keep(self.cancelled)
            self.assertLess(time.monotonic() - began, 2)
            self.assertIn("no dump of its pool", self.log.output)
            self.assertEqual(pools.DEFAULTS, self.server.values)

    def test_without_an_account_the_memory_is_looked_at(self) -> None:
        self.server.in_pool = PAGES
        for deny in ("refuses_login", "may_set"):
            server = PoolServer(self.data)
            setattr(server, deny, deny == "refuses_login")
            self.server = server
            # This process has no pool: nothing is found, and so nothing is written
            self.keeper().keep(self.cancelled)
            self.assertEqual(0, server.dumps)
            self.assertEqual([], list(self.data.iterdir()))
            self.assertNotIn("WARNING", self.log.output)


class WarmUpTest(PoolTestCase):
    def setUp(self) -> None:
        super().setUp()
        write_list(self.data, PAGES)
        self.useFixture(fixtures.MockPatchObject(turns, "FEWEST_PAGES", 1))

    def make(self, pages_per_second: int = 3) -> warm_up.WarmUp:
        made = warm_up.WarmUp(
            self.state / "warm-up.json",
            self.server,
            self.server.connect,
            self.borrowed(),
            pages_per_second * 16384,
            "this-boot",
        )
        made.recover()
        return made

    def run_one(self, pages_per_second: int = 1000) -> Any:
        made = self.make(pages_per_second)
        made.request()
        made.run(self.cancelled)
        return made.state

    def test_nobody_has_asked(self) -> None:
        self.assertEqual("idle", self.make().state.state)

    def test_the_list_is_loaded_hottest_first_at_the_rate(self) -> None:
        began = time.monotonic()
        state = self.run_one(3)
        self.assertEqual(("done", 8, 8), (state.state, state.loaded, state.total))
        self.assertEqual([PAGES[:3], PAGES[3:6], PAGES[6:]], self.server.loads)
        self.assertGreater(time.monotonic() - began, 2.5)
        self.assertGreater(state.seconds, 2.5)
        self.assert_put_back()

    def test_the_rate_is_one_of_bytes_however_large_pages_are(self) -> None:
        self.useFixture(fixtures.MockPatchObject(turns, "FEWEST_PAGES", 64))
        self.server.page_bytes = 65536
        self.assertEqual("done", self.run_one(4 * 4).state)
        self.assertEqual([PAGES[:4], PAGES[4:]], self.server.loads)

    def test_a_server_with_a_fixed_name_loads_pieces_under_it_while_the_list_is_kept(self) -> None:
        self.server.name_is_fixed = True
        self.assertEqual("done", self.run_one(5).state)
        self.assertEqual([PAGES[:5], PAGES[5:]], self.server.loads)
        self.assertEqual(PAGES, read_list(self.data))
        self.assert_put_back()

    def test_a_server_may_read_as_fast_as_is_allowed_while_it_is_filled(self) -> None:
        self.run_one(8000)
        (settings,) = self.server.settings
        self.assertEqual("4001", settings[flushing.CAPACITY])
        self.assertEqual("4001", settings[flushing.CAPACITY_MAX])
        self.assert_put_back()

    def test_what_a_server_allows_anyway_stays(self) -> None:
        self.run_one(100)
        (settings,) = self.server.settings
        self.assertEqual("200", settings[flushing.CAPACITY])

    def test_its_own_load_is_ended_first(self) -> None:
        self.server.own_load = True
        self.assertEqual("done", self.run_one().state)
        self.assertFalse(self.server.own_load)

    def test_pieces_grow_as_long_as_the_volume_is_quick_and_shrink_where_it_is_not(self) -> None:
        for size, took, then in (
            (256, 0.05, 512),
            (6000, 0.1, 6400),
            (1000, 1.0, 1500),
            (10, 500, 1),
        ):
            turn = turns.Turns(6400)
            turn.note(size, took, reads=300, can=300)
            self.assertEqual(then, turn.size)

    def test_clients_have_what_they_read_and_the_filling_has_the_rest(self) -> None:
        turn = turns.Turns(6400)
        self.assertEqual(3.0, turn.rest(1.0))
        for _ in range(20):
            turn.note(256, 0.5, reads=300, can=300)
        self.assertAlmostEqual(3.0, turn.rest(1.0))
        for _ in range(20):
            turn.note(256, 0.5, reads=225, can=300)
        self.assertAlmostEqual(1.0, turn.rest(1.0), 3)
        for _ in range(20):
            turn.note(256, 0.5, reads=150, can=300)
        self.assertAlmostEqual(1 / 9, turn.rest(1.0), 3)
        for _ in range(20):
            turn.note(256, 0.5, reads=0, can=300)
        self.assertAlmostEqual(1 / 9, turn.rest(1.0), 3)
        self.assertEqual(512, turn.size)
        for _ in range(20):
            turn.note(256, 0.5, reads=0, can=0)
        self.assertAlmostEqual(3.0, turn.rest(1.0), 3)

    def test_a_pool_that_is_full_is_not_filled_further(self) -> None:
        self.server.free = 14
        state = self.run_one(4)
        self.assertEqual(("done", 4, 8), (state.state, state.loaded, state.total))
        self.assertIn("was full with 4 of 8 pages", state.message)

    def test_without_an_account_it_says_what_to_do(self) -> None:
        for deny, code in (("refuses_login", "login"), ("may_set", "no-grant")):
            self.server = PoolServer(self.data)
            setattr(self.server, deny, deny == "refuses_login")
            state = self.run_one()
            self.assertEqual(("failed", code), (state.state, state.code))
            self.assertIn("nova-dmigrate-agent grants", state.message)
            self.assertIn("innodb_buffer_pool_load_at_startup", state.message)
            self.assert_put_back()

    def test_a_server_that_answers_with_errors_is_given_up(self) -> None:
        def load() -> None:
            raise exception.ServerError(server="it", reason="no way", code="failed")

        self.server.load = load  # type: ignore[method-assign]
        state = self.run_one()
        self.assertEqual(("failed", "failed"), (state.state, state.code))
        self.assertIn("no way", state.message)
        self.assert_put_back()

    def test_without_a_list_it_says_so(self) -> None:
        (self.data / "ib_buffer_pool").unlink()
        state = self.run_one()
        self.assertEqual(("failed", "no-list"), (state.state, state.code))

    def test_whatever_is_amiss_with_one_of_several_servers_the_others_are_filled(self) -> None:
        def no_login(bad: PoolServer) -> None:
            bad.refuses_login = True

        def no_load(bad: PoolServer) -> None:
            error = exception.ServerError(server="it", reason="no way", code="load")
            bad.load = mock.Mock(side_effect=error)  # type: ignore[method-assign]

        def odd_name(bad: PoolServer) -> None:
            bad.values[hotlist_server.FILENAME] = "a/path"

        def no_list(bad: PoolServer) -> None:
            (bad.directory / "ib_buffer_pool").write_text("this is no list")

        for spoil, code in (
            (no_login, "login"),
            (no_load, "load"),
            (odd_name, "unusual-name"),
            (no_list, "no-list"),
        ):
            bad, good = PoolServer(self.make_directory()), PoolServer(self.data)
            bad.process = dataclasses.replace(bad.process, socket="/run/bad.sock", start_time=1)
            write_list(bad.directory, PAGES)
            spoil(bad)
            self.server = good
            both = {"/run/bad.sock": bad.connect, "/run/mysqld.sock": good.connect}
            found = [bad.process, good.process]
            good.find = mock.Mock(return_value=found)  # type: ignore[method-assign]
            good.connect = mock.Mock(  # type: ignore[method-assign]
                side_effect=lambda login, both=both: both[login.socket](login)
            )
            state = self.run_one()
            self.assertEqual([PAGES], good.loads)
            self.assertEqual(("failed", code), (state.state, state.code))
            self.assert_put_back()

    def test_a_server_that_recovers_is_waited_for(self) -> None:
        serving = self.server.process
        self.server.process = dataclasses.replace(serving, socket=None)
        looks = []

        def find() -> Any:
            looks.append(self.server.loads.copy())
            if len(looks) == 3:
                self.server.process = serving
            return [self.server.process]

        self.server.find = find  # type: ignore[method-assign]
        self.assertEqual("done", self.run_one().state)
        self.assertEqual([[]] * 3, looks[:3])

    def test_a_server_that_never_comes_is_given_up(self) -> None:
        self.server.process = dataclasses.replace(self.server.process, socket=None)
        self.useFixture(fixtures.MockPatchObject(warm_up, "_WAIT_SECONDS", 0.05))
        state = self.run_one()
        self.assertEqual(("failed", "no-server"), (state.state, state.code))

    def test_a_server_that_dies_is_waited_for_and_filled_from_the_beginning(self) -> None:
        self.server.dies_at = 1
        real = self.server.load

        def load() -> None:
            try:
                real()
            except exception.ServerError:
                fresh = dataclasses.replace(self.server.process, start_time=1)
                self.server.process, self.server.dies_at = fresh, None
                raise

        self.server.load = load  # type: ignore[method-assign]
        made = self.make(4)
        made.request()
        made.run(self.cancelled)
        self.assertEqual("done", made.state.state)
        self.assertEqual([PAGES[:4], PAGES[:4], PAGES[4:]], self.server.loads)

    def test_an_agent_that_comes_after_a_killed_one_goes_on_where_it_was(self) -> None:
        made = self.make(4)
        made.request()
        self.server.dies_at = 1

        class Killed(BaseException):
            pass

        def load() -> None:
            if len(self.server.loads) == 1:
                raise Killed
            PoolServer.load(self.server)

        self.server.load = load  # type: ignore[method-assign]
        # What a killed agent does not come to
        with mock.patch.object(changes.Borrowed, "put_back", lambda self: None):
            self.assertRaises(Killed, made.run, self.cancelled)
        self.assertNotEqual(pools.DEFAULTS, self.server.values)

        self.server.load = lambda: PoolServer.load(self.server)  # type: ignore[method-assign]
        self.server.dies_at = None
        successor = self.make(4)
        self.assertTrue(successor.wanted)
        self.assertEqual(pools.DEFAULTS, self.server.values)
        successor.run(self.cancelled)
        self.assertEqual([PAGES[:4], PAGES[4:]], self.server.loads)
        self.assertEqual(("done", 8), (successor.state.state, successor.state.loaded))
        self.assert_put_back()

    def test_what_was_asked_before_the_guest_was_restarted_is_over(self) -> None:
        self.make().request()
        other = warm_up.WarmUp(
            self.state / "warm-up.json",
            self.server,
            self.server.connect,
            self.borrowed(),
            1,
            "another-boot",
        )
        other.recover()
        self.assertEqual("idle", other.state.state)


class HotPagesTest(PoolTestCase):
    def make(self, busy: bool = False) -> hot_pages.HotPages:
        made = hot_pages.HotPages(
            self.state,
            self.server,
            self.server.connect,
            hot_pages.HotPagesSettings(warm_up_rate=16384 * 64),
            options.MapOptions(),
            lambda: self.busy,
        )
        self.busy = busy
        self.addCleanup(made.stop)
        return made

    def wait(self, made: hot_pages.HotPages, *states: str) -> Any:
        while made.warm_up_state().state not in states:
            time.sleep(0.01)
        return made.warm_up_state()

    def test_a_request_is_done_once_however_often_it_comes(self) -> None:
        write_list(self.data, PAGES)
        made = self.make()
        for _ in range(3):
            self.assertEqual("waiting", made.warm_up().state)
        made.start()
        self.assertEqual(8, self.wait(made, "done").loaded)
        self.assertEqual(1, len(self.server.loads))

    def test_a_request_of_the_command_line_is_taken(self) -> None:
        write_list(self.data, PAGES)
        made = self.make()
        made.start()
        hot_pages.ask_running_agent(self.state)
        self.wait(made, "done")
        # It is told on disk a moment later
        while (state := hot_pages.running_agents_state(self.state)) is None or (
            state.state == "running"
        ):
            time.sleep(0.01)
        self.assertEqual("done", state.state)

    def test_while_a_migration_is_prepared_nothing_is_done(self) -> None:
        write_list(self.data, PAGES)
        made = self.make(busy=True)
        made.warm_up()
        made.start()
        time.sleep(0.3)
        self.assertEqual("waiting", made.warm_up_state().state)
        self.busy = False
        made.warm_up()
        self.wait(made, "done")

    def test_a_migration_ends_what_is_under_way_with_everything_put_back(self) -> None:
        write_list(self.data, [(1, number) for number in range(1000)])
        made = self.make()
        made.start()
        made.warm_up()
        while not self.server.loads:
            time.sleep(0.01)
        with made.held_off():
            self.assert_put_back_but_state()
            state = made.warm_up_state()
            self.assertEqual(("stopped", "migration"), (state.state, state.code))
        self.assertLess(len(self.server.loads), 10)

    def assert_put_back_but_state(self) -> None:
        self.assertEqual(pools.DEFAULTS, self.server.values)
        self.assertEqual([], list(self.state.glob("hot-pages*")))

    def test_at_its_end_the_agent_leaves_nothing_changed_and_the_rest_to_the_next(self) -> None:
        write_list(self.data, [(1, number) for number in range(1000)])
        made = self.make()
        made.start()
        made.warm_up()
        while not self.server.loads:
            time.sleep(0.01)
        made.stop()
        self.assert_put_back_but_state()
        self.assertEqual("running", made.warm_up_state().state)

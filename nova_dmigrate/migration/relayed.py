# SPDX-License-Identifier: Apache-2.0
"""All that a migration through relays needs around libvirt's own part, whoever calls libvirt.

What was changed on the way (settings of the database, relays) is put back in any case, or goes by
itself when its lease ends.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE, MapLimits
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration.database_series import DatabaseSample, DatabaseSeries
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.guest_map import GuestMapFetch
from nova_dmigrate.migration.prepared_database import PreparedDatabase
from nova_dmigrate.migration.sessions import RelaySessions, Terms, volume_troubles
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.waiting import Question, answer_of, answer_within
from nova_dmigrate.retention import Retention
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import FINAL
from nova_dmigrate.volumes import VolumeSpec

LOG = logging.getLogger(__name__)

#: Until the bulk is resolved QEMU must not switch over (milliseconds); see "downtime" in the
#: architecture.
_HELD = 1
#: A source relay that tells nothing for so many seconds does not hold the switchover back any more.
_SILENCE = 15.0
_POLL = 0.2
#: Seconds for the answer of QEMU's monitor. There is none where QEMU hangs, as with its storage.
_MONITOR_PATIENCE = 10.0
#: A source relay reads its files when it is given them.
_READ_LONG_AGO = Retention(days=1)

Report = dict[str, Any]


class Peers:
    """Ways to the services of both hosts, and to the agent.

    :ivar agent: makes a client of the agent, given the service of the host where the guest runs.
    """

    def __init__(
        self,
        source: HostClient,
        destination: HostClient,
        agent: Callable[[HostClient], AgentClient],
    ) -> None:
        self.source = source
        self.destination = destination
        self.agent = agent


@dataclasses.dataclass(frozen=True)
class Guest:
    """What there is to know of the guest.

    :ivar memory: bytes of it.
    :ivar volumes: that the destination may read.
    :ivar layout: asks QEMU where memory lies (``info mtree -f``); raises MigrationError.
    :ivar runs_here: asks whether the guest runs on the source host.
    :ivar domain: libvirt's UUID of it; None for the instance's.
    :ivar connected: the destination has connected the volumes itself, perhaps at other paths.
    """

    memory: int
    volumes: Sequence[VolumeSpec]
    layout: Callable[[], str]
    runs_here: Callable[[], bool]
    domain: str | None = None
    connected: bool = False


class RelayedMigration:
    """Relays on both hosts and the buffer map on its way, from entering this context to leaving it.

    While it is entered, libvirt migrates to :attr:`uri` and whoever has called it also calls
    :meth:`follow` several times a second.

    :param socket_directory: of both hosts, for the sockets of QEMU.
    :param enter: is told the name of each step before it begins, and several times a second while
        that lasts until memory is sent; what it raises ends all.
    :param map_first: wait for the map, and fall back if there is none, before anything is begun.
    :ivar downtime_limit: QEMU's, in milliseconds, once it may switch over; may be changed.
    :ivar reports: of the relays by role, when it has been left.
    :ivar failure: why a relay has failed, if one has.
    """

    def __init__(
        self,
        migration_id: str,
        instance: str,
        guest: Guest,
        peers: Peers,
        settings: OrchestrationSettings,
        terms: Terms,
        socket_directory: str,
        downtime_limit: int,
        enter: Callable[[str], None],
        map_first: bool = False,
    ) -> None:
        self._id = migration_id
        self._instance = instance
        self._guest = guest
        self._peers = peers
        self._settings = settings
        self._enter = enter
        self._map_first = map_first
        self._socket = Path(socket_directory) / migration_id / "qemu"
        self._buffer_map = settings.state_directory / f"{migration_id}.map"
        self._layout = settings.state_directory / f"{migration_id}.mtree"
        self._sessions = RelaySessions(
            migration_id,
            instance,
            peers.source,
            peers.destination,
            self._socket,
            guest.memory,
            settings.lease,
            terms,
        )
        self._ends = contextlib.ExitStack()
        self._mapping: GuestMapFetch | None = None
        self._given: bool | None = None
        self._handing_over = Question(self._hand_over_map)
        self._progress = Question(self._sessions.look)
        self._told: Report = {}
        self._heard = self._news = 0.0
        self._blind = False
        self._held = False
        self.downtime_limit = downtime_limit
        self._applied: int | None = None
        self._database = DatabaseSeries(
            lambda: peers.agent(peers.source), lambda: peers.agent(peers.destination)
        )
        self.reports: dict[str, Report] = {}

    def __enter__(self) -> "RelayedMigration":
        """:raises FallBack: libvirt shall migrate as it would without us.
        :raises MigrationCancelled: ``enter`` has.
        """
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._ends = stack.pop_all()
        self._heard = self._news = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    @property
    def uri(self) -> str:
        """Where the source's QEMU sends its stream, and the destination's receives it."""
        return f"unix:{self._socket}"

    @property
    def failure(self) -> str | None:
        return self._sessions.failure

    @property
    def silence(self) -> float:
        """Seconds for which the source relay has told nothing; 0 for one that has ended.

        What it has told before, its host repeats.
        """
        ended = self._told.get("state") in FINAL
        return 0.0 if ended else time.monotonic() - self._news

    def give_up(self, why: str) -> None:
        """Whatever its relays tell, one of them has failed."""
        self._sessions.note_failure(why)

    @property
    def converging(self) -> bool:
        """Whether QEMU may switch over."""
        return self._applied is not None

    @property
    def mapping_seconds(self) -> float | None:
        """Seconds until the map was there; None if it never was."""
        seconds = self._mapping.seconds if self._mapping is not None else None
        return None if seconds is None else round(seconds, 3)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the agent has found when it made the map, and the destination when it read volumes,
        the latter only once it has been left.
        """
        made = self._mapping.findings if self._mapping is not None else ()
        return made + tuple(
            Finding("volume-unreadable", Severity.NOTE, f"{why} (at the destination)")
            for why in volume_troubles(self.reports.get("destination", {})).values()
        )

    @property
    def database_samples(self) -> tuple[DatabaseSample, ...]:
        """How the database has fared, when it has been left; empty if that is not known."""
        return self._database.samples

    @property
    def applied_downtime_limit(self) -> int | None:
        """QEMU's limit at this moment, in milliseconds; None if it was not set."""
        return self._applied if self._applied is not None else _HELD if self._held else None

    def follow(self, set_max_downtime: Callable[[int], bool] | None) -> Report:
        """Have the map used when it comes, and hold QEMU back until the bulk is resolved; the last
        that the source relay has told. No host is waited for.

        :param set_max_downtime: takes milliseconds, returns whether that was possible; None as long
            as QEMU has not begun.
        """
        told = None
        try:
            told = self._look()
        except Exception:
            # The stream goes on: it is as if the relay had nothing to tell
            if not self._blind:
                LOG.exception("Instance %s: its migration is not seen", self._instance)
            self._blind = True
        if set_max_downtime is not None:
            if self._may_switch(told):
                if self._applied != self.downtime_limit and set_max_downtime(self.downtime_limit):
                    self._applied = self.downtime_limit
            elif not self._held:
                self._held = set_max_downtime(_HELD)
        return self._told

    def _look(self) -> Report | None:
        """Have the map handed over; what the source relay tells, if it does."""
        if self._given is None:
            self._handing_over.answer()
        if self._database.astray and not self._guest.runs_here():
            self._database.moved()  # post-copy: libvirt is not done yet
        told = self._progress.answer()
        if told is not None:
            now = time.monotonic()
            if told != self._told:
                self._news = now
            self._told, self._heard = told, now
            if told.get("passes", 0) > 1 and self._mapping is not None:
                self._mapping.abandon()
        return told

    def without_volumes(self) -> exception.FallBack | None:
        """Why the volumes were of no use; None if they were.

        Until it has been left, that is by what the source relay has told last.
        """
        assert self._mapping is not None
        if self._mapping.failure is not None:
            return self._mapping.failure
        told = {**self._told, **self.reports.get("source", {})}
        state = told.get("map")
        if state == "taken" and told.get("mapped_pages"):
            # What was in use can have come to nothing
            return self._sessions.unreadable(self.reports.get("destination", {}))
        if self._given is False or state in ("refused", "taken"):
            return because(Reason.MAP_REFUSED, self._instance)
        undelivered = self._undelivered()
        if undelivered is not None and state in (None, "none") and not self._mapping.late:
            return undelivered
        return because(Reason.LATE_MAP, self._instance)

    def _undelivered(self) -> exception.FallBack | None:
        """Why it is not known whether the source's host has taken the map; None if it is."""
        pending = self._sessions.map_pending
        if pending is None:
            return None
        refused = isinstance(pending, exception.HostRefused)
        reason = Reason.HOST_REFUSED if refused else Reason.HOST_UNREACHABLE
        return because(reason, self._instance, error=pending)

    # The beginning

    def _open(self, stack: contextlib.ExitStack) -> None:
        agent = stack.enter_context(self._peers.agent(self._peers.source))
        database = PreparedDatabase(agent, self._settings.lease)
        # The last thing that is done: it takes its time, and nothing else waits for it.
        stack.callback(self._database.stop)
        # The guest is where it will be by then.
        stack.callback(self._restore, database)
        stack.enter_context(self._files())
        self._look_at_guest(agent)
        self._database.start()
        self._mapping = stack.enter_context(self._fetch_map(agent, database))
        stack.callback(self._close_sessions)
        # The first thing: to close what there is may take seconds
        stack.callback(self._let_go, database)
        self._enter("waiting")
        self._sessions.order_destination(
            self._guest.volumes, waiting=lambda: self._enter("waiting")
        )
        self._enter("starting relays")
        self._sessions.order_source(
            self._guest.domain,
            self._guest.connected,
            waiting=lambda: self._enter("starting relays"),
        )
        # Not sooner: while others have the relays, what it maps would change
        self._mapping.start()
        self._sessions.open(waiting=lambda: self._enter("starting relays"))
        if self._map_first:
            self._enter("mapping")
            while not self._mapping.wait(0.5):
                self._mapping_goes_on()  # ends it if it was cancelled
        self._mapping.check()
        if self._map_first:
            self._wait_until_loaded()
        else:
            answer_of(self._hand_over_map, lambda: self._enter("starting relays"))

    def _wait_until_loaded(self) -> None:
        """See that the source relay has the map. It grows with the guest, as what the agent needs
        to make it does: the relay gets as much time.

        :raises FallBack: it has not.
        """
        end = time.monotonic() + self._settings.map_time
        while time.monotonic() < end:
            answer_of(self._hand_over_map, self._mapping_goes_on)
            told = answer_of(self._sessions.look, self._mapping_goes_on) or {}
            if self.failure is not None:
                raise because(Reason.RELAY_FAILED, self._instance, error=self.failure)
            if told.get("map") == "offered":
                return
            if self._given is False or told.get("map") == "refused":
                break
            time.sleep(_POLL)
            self._mapping_goes_on()
        raise self._undelivered() or because(Reason.MAP_REFUSED, self._instance)

    def _mapping_goes_on(self) -> None:
        self._enter("mapping")

    def _look_at_guest(self, agent: AgentClient) -> None:
        """See that the guest has what is needed, before anything is begun.

        :raises FallBack: it has not.
        """
        try:
            answer_of(agent.ping, lambda: self._enter("checking"))
        except exception.AgentUnreachable as error:
            raise because(Reason.AGENT_UNREACHABLE, self._instance, error=error) from error
        except exception.AgentRefused as error:
            raise because(Reason.AGENT_REFUSED, self._instance, error=error) from error
        try:
            layout = answer_within(
                _MONITOR_PATIENCE, self._guest.layout, lambda: self._enter("checking")
            )
        except (exception.MigrationError, TimeoutError) as error:
            raise because(Reason.MEMORY_LAYOUT, self._instance, error=error) from error
        try:
            self._layout.write_text(layout)
        except OSError as error:
            raise because(Reason.NO_STATE, self._instance, error=error) from error

    def _fetch_map(self, agent: AgentClient, database: PreparedDatabase) -> GuestMapFetch:
        memory, settings = self._guest.memory, self._settings
        return GuestMapFetch(
            agent, database, settings, _map_limits(settings, memory), memory, self._buffer_map
        )

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        """A place for the files that the source relay reads; they are gone afterwards.

        So are those of whoever was killed while they were there.
        """
        directory = self._layout.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _READ_LONG_AGO.prune(directory.iterdir())
        except OSError as error:
            raise because(Reason.NO_STATE, self._instance, error=error) from error
        try:
            yield
        finally:
            for path in (self._buffer_map, self._layout):
                path.unlink(missing_ok=True)

    # On the way, and the end

    def _hand_over_map(self) -> None:
        if self._given is None and self._mapping is not None and self._mapping.ready:
            self._given = self._sessions.use_map(self._buffer_map, self._layout)

    def _may_switch(self, told: Report | None) -> bool:
        if self.converging:
            return True
        if told is None:
            return time.monotonic() > self._heard + _SILENCE
        return bool(told.get("bulk_resolved") or told.get("pass_through"))

    def _let_go(self, database: PreparedDatabase) -> None:
        """An agent that has gone with its guest is not asked at the source any more, and no map is
        wanted from it.
        """
        assert self._mapping is not None
        self._mapping.abandon()
        if not self._guest.runs_here():
            database.let_go()
            self._database.moved()

    def _close_sessions(self) -> None:
        self.reports = self._sessions.close()

    def _restore(self, database: PreparedDatabase) -> None:
        if not database.held:
            return
        here = self._peers.source if self._guest.runs_here() else self._peers.destination
        with self._peers.agent(here) as agent:
            database.restore(agent)


def _map_limits(settings: OrchestrationSettings, memory: int) -> MapLimits:
    """No page of the guest is mapped twice: a map with more is not worth reading."""
    limits = settings.map_limits
    return dataclasses.replace(limits, max_pages=min(limits.max_pages, memory // PAGE_SIZE))

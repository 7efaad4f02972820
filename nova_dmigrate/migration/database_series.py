# SPDX-License-Identifier: Apache-2.0
"""How the guest's database fares while it is migrated: what its agent says about once a second.

Nothing waits for the agent: what it does not answer is missing, and there is nothing at all where
it is too old or does not get into the database.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from nova_dmigrate import exception
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.rpc.messages import ServerHealth

LOG = logging.getLogger(__name__)

#: An agent does one thing at a time where it is asked over its port. For so many times as long as
#: an answer took, it is left to those who want the map or hold the lease.
_REST = 9
#: Seconds after the switchover that belong to the series.
_AFTER = 3.0
#: Samples kept; when there are more, every second one goes and the interval doubles.
_LIMIT = 3600


@dataclasses.dataclass(frozen=True)
class DatabaseSample:
    """What all servers of the guest had done at a moment since the first sample.

    :ivar moment: monotonic seconds.
    :ivar commits: COMMIT statements; :ivar queries: statements of all kinds.
    :ivar latency_ms: milliseconds that a statement which does nothing took, of the slowest server.
    """

    moment: float
    commits: int
    queries: int
    latency_ms: float


class DatabaseSeries:
    """Asks the agent from `start` to `stop`, with clients of its own, in a thread for each host:
    what the guest has not answered when it goes holds up nobody where it arrives.

    :param at_source: makes a client of the agent while the guest runs there.
    :param at_destination: the same where the guest goes.
    :param interval: seconds from one question to the next.
    """

    def __init__(
        self,
        at_source: Callable[[], AgentClient],
        at_destination: Callable[[], AgentClient],
        interval: float = 1.0,
    ) -> None:
        self._at_source = at_source
        self._at_destination = at_destination
        self._interval = interval
        self._lock = threading.Lock()
        self._samples: list[DatabaseSample] = []
        self._totals = (0, 0)
        self._servers: dict[str, ServerHealth] = {}
        self._silent = False
        self._moved_at: float | None = None
        self._left_source = threading.Event()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin. The agent is there."""
        self._begin(self._at_source, self._left_source)

    @property
    def astray(self) -> bool:
        """Whether the agent is asked at the source and does not answer: the guest may have gone."""
        return self._silent and not self._left_source.is_set()

    def moved(self) -> None:
        """The guest runs at the destination."""
        if self._moved_at is None:
            self._moved_at = time.monotonic()
            with self._lock:
                self._left_source.set()
            if self._threads and not self._stopped.is_set():
                self._begin(self._at_destination, self._stopped)

    def stop(self) -> None:
        """End; some seconds after the switchover if there was one. An answer that is waited for is
        one of the series'."""
        if self._samples and self._moved_at is not None:
            self._threads[-1].join(max(0.0, self._moved_at + _AFTER - time.monotonic()))
        self._give_up()
        for thread in self._threads:
            thread.join()

    @property
    def samples(self) -> tuple[DatabaseSample, ...]:
        """What there is until now, oldest first."""
        return tuple(self._samples)

    def _begin(self, connect: Callable[[], AgentClient], over: threading.Event) -> None:
        thread = threading.Thread(
            target=self._run, args=(connect, over), name="database-series", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _give_up(self) -> None:
        self._stopped.set()
        self._left_source.set()

    # The threads

    def _run(self, connect: Callable[[], AgentClient], over: threading.Event) -> None:
        try:
            with connect() as agent:
                rest = 0.0
                # Once in any case: where the guest has gone, that may be all there is time for
                while rest == 0.0 or not over.wait(rest):
                    began = time.monotonic()
                    self._look(agent, at_source=over is self._left_source)
                    took = time.monotonic() - began
                    rest = max(self._interval - took, _REST * took)
        except Exception:
            # It is only looked at: the migration goes on in any case
            LOG.exception("The database is not looked at any more")

    def _look(self, agent: AgentClient, at_source: bool) -> None:
        try:
            health = agent.health(attempts=1)
        except exception.RpcError as error:
            LOG.debug("The database is not seen: %s", error)
            self._silent = True
            return
        self._silent = False
        servers = {each.name: each for each in health.servers if each.latency_ms is not None}
        with self._lock:
            if at_source and self._left_source.is_set():
                return  # it may be older than what the destination's agent has said by now
            if servers:
                self._note(servers)
            elif not self._samples:
                # To try again would leave another refused login in the server's log each time
                LOG.info("Instance %s: the agent has no figures of the database", agent.instance)
                self._give_up()

    def _note(self, servers: dict[str, ServerHealth]) -> None:
        commits, queries = self._totals
        for name, server in servers.items():
            before = self._servers.get(name)
            if before is not None:
                # Less than before: it was started anew
                commits += max(0, (server.commits or 0) - (before.commits or 0))
                queries += max(0, (server.queries or 0) - (before.queries or 0))
        self._servers = servers
        self._totals = commits, queries
        latency = max(each.latency_ms or 0.0 for each in servers.values())
        self._samples.append(DatabaseSample(time.monotonic(), commits, queries, latency))
        if len(self._samples) > _LIMIT:
            self._samples = thinned(self._samples)
            self._interval *= 2


def thinned(samples: Sequence[DatabaseSample]) -> list[DatabaseSample]:
    """Every second sample, with the latency of the slower one of two."""
    return [
        dataclasses.replace(after, latency_ms=max(before.latency_ms, after.latency_ms))
        for before, after in zip(samples[::2], samples[1::2], strict=False)
    ] + list(samples[len(samples) // 2 * 2 :])

# SPDX-License-Identifier: Apache-2.0
"""A database server at work that Nova live-migrates, and what each migration has cost."""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.lab.database_image import MARIADB, Release
from tests.lab.demo.ledger import Ledger
from tests.lab.demo.load import Load
from tests.lab.demo.measure import CALM, load_series, network_series
from tests.lab.demo.probe import Probe
from tests.lab.demo.workloads import command
from tests.lab.openstack.client import CloudError, Order
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.guest import DatabaseServer
from tests.lab.openstack.move import COMPLETED, Move, Summary
from tests.lab.openstack.service import PATIENCE

STOCK, DMIGRATE = "pre-copy", "dmigrate"
#: The policy of a server's migrations, by the name of the mode.
POLICIES = {STOCK: "disabled", DMIGRATE: "preferred"}
#: DMigrate's, among those of a live migration.
EVENT = "compute_dmigrate"
_NOTIFICATION = re.compile(
    r"oslo\.messaging\.notification\.dmigrate\.migration\.end .*?(\{.*\})$", re.MULTILINE
)

#: As reports have it.
Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """``ram_mb``, ``pool_mb``: of server and buffer pool; ``network``: MB/s; ``rate``: transactions
    a second that sysbench asks for; ``release``: of the database.
    """

    ram_mb: int = 1280
    pool_mb: int = 512
    network: float = 16
    rate: float = 4
    load: str = "oltp_read_write"
    release: Release = MARIADB


class Migration:
    """A live migration from its order to all that is told of it."""

    def __init__(self, cloud: OpenStack, server: Any) -> None:
        """Order it; the scheduler chooses the host."""
        self._cloud, self._server = cloud, server
        source = cloud.client.host_of(server)
        self._known = len(_summaries(cloud, source, server))
        self.order = Order(cloud.client, server)

    def end(self, told: bool) -> Move:
        """Wait for the end of it.

        :param told: whether DMigrate tells of it, which it does when the database has its settings
            back; it is an error if it does otherwise.
        :raises CloudError: it does not end, or what is told is not what shall be.
        """
        client, server, source = self._cloud.client, self._server, self.order.source
        status = self.order.wait()
        summary = self._wait_for_summary() if told else {}
        event = "".join(each for each in client.events(server) if each.startswith(EVENT))
        if bool(event) != bool(summary):
            raise CloudError(f"DMigrate's notification is {summary}, its event {event!r}")
        return Move(status, source, client.host_of(server), summary, event)

    def _wait_for_summary(self) -> Summary:
        found: list[Summary] = []

        def is_told() -> bool:
            found[:] = _summaries(self._cloud, self.order.source, self._server)[self._known :]
            return bool(found)

        self._cloud.client.wait(is_told, "DMigrate tells of the migration")
        return found[0]


class WorkingServer:
    """A database server with its clients at work: load, ledger and probe. A context manager."""

    def __init__(
        self, cloud: OpenStack, database: DatabaseServer, shape: Shape, directory: Path
    ) -> None:
        """:param directory: an empty one, for what the clients note."""
        self.database = database
        self.server = server = database.sql_server
        self._cloud, self._shape = cloud, shape
        self._ends = contextlib.ExitStack()
        enter = self._ends.enter_context
        try:
            self._probe = enter(Probe(server, directory))
            self.ledger = enter(Ledger(server, directory))
            argv = command(shape.load, server, shape.pool_mb, shape.rate)
            self._load = enter(Load(server, argv, directory))
        except BaseException:
            self._ends.close()
            raise

    def __enter__(self) -> "WorkingServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def choose(self, mode: str) -> None:
        """Have its migrations be of that mode."""
        self._cloud.client.sdk.compute.set_server_metadata(
            self.database.server.id, dmigrate_policy=POLICIES[mode]
        )

    def migrate(
        self, mode: str, scenario: str, ordered: Callable[[], None] = lambda: None
    ) -> tuple[Move, Run]:
        """Have Nova migrate it to the other host.

        :param scenario: of the run.
        :param ordered: is called as soon as Nova has the order.
        :raises CloudError: it does not end, or what is told is not what shall be.
        """
        client, server, link = self._cloud.client, self.database.server, self._cloud.hosts.link
        self.choose(mode)
        time.sleep(CALM)
        migration = Migration(self._cloud, server)
        begin = migration.order.began
        with network_series(link) as network:
            ordered()
            client.wait(migration.order.over, f"the migration of {server.name} is over", 0.5)
            end = time.monotonic()
        move = migration.end(told=POLICIES[mode] != "disabled")
        time.sleep(max(end + CALM + 1 - time.monotonic(), 0))
        silence = self._probe.silence(begin, end)
        before, summary = self._load.tps(begin - CALM + 1, begin), move.summary
        return move, {
            "scenario": scenario,
            "mode": mode,
            "database": self._shape.release.flavour,
            "network_mb_s": self._shape.network,
            "pool_share": self._shape.pool_mb / self._shape.ram_mb,
            "completed": move.status == COMPLETED,
            "fallback_reason": summary.get("fallback_reason"),
            "total_s": round(end - begin, 3),
            "downtime_ms": round(silence.downtime * 1e3, 1),
            "guest_bytes": summary.get("guest_bytes"),
            "wire_bytes": int(network[-1][1]),
            "volume_bytes": summary.get("volume_bytes", 0),
            "pages_referenced": summary.get("pages_referenced", 0),
            "misses": summary.get("misses", 0),
            "tps_before": round(before, 2),
            "tps_during": round(self._load.tps(begin, end), 2),
            "tps_after": round(self._load.tps(end, end + CALM), 2),
            "recover_90_s": self._load.recovered(end, 0.9 * before),
            "lost_commits": self.ledger.check().lost,
            "series": {
                **load_series([self._load], begin, end),
                "network": network,
                "downtime": [silence.begin - begin, silence.end - begin],
            },
        }

    def wait_for_commit(self, patience: float = PATIENCE) -> None:
        """Wait until the database acknowledges one more commit.

        :param patience: seconds.
        :raises CloudError: it does not.
        """
        known = self.ledger.acknowledged()
        self._cloud.client.wait(
            lambda: self.ledger.acknowledged() > known, "a commit is acknowledged", 0.5, patience
        )

    def outlive(self) -> None:
        """Let the clients go on once the database's host has died and it serves elsewhere.

        :raises CloudError: it does not serve.
        """
        # It may wait for an answer, without end; the others have a limit
        self._load.begin_anew()
        self.wait_for_commit()

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """No table but the ledger's changes meanwhile."""
        with self._load.paused():
            yield

    def stop_clients(self) -> None:
        """Let the clients finish; what they have noted stays."""
        for client in (self._load, self.ledger, self._probe):
            client.stop()


def _summaries(cloud: OpenStack, host: str, server: Any) -> list[Summary]:
    """DMigrate's of a server's migrations that have left a host, as its notifications have them."""
    log = cloud.site.services.log(cloud.computes[host].nova_compute).read_text(errors="replace")
    told = [json.loads(each)["payload"] for each in _NOTIFICATION.findall(log)]
    return [each for each in told if each["instance"] == server.id]

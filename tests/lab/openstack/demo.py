# SPDX-License-Identifier: Apache-2.0
"""A database server at work that Nova live-migrates, and what each migration has cost."""

import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

from tests.lab.demo.ledger import Ledger
from tests.lab.demo.load import Load
from tests.lab.demo.probe import Probe
from tests.lab.demo.workloads import command
from tests.lab.openstack.client import CloudError
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.guest import RELEASE, DatabaseServer
from tests.lab.openstack.service import PATIENCE

#: The policy of a server's migrations, by the name of the mode.
POLICIES = {"pre-copy": "disabled", "dmigrate": "preferred"}
#: DMigrate's, among those of a live migration.
EVENT = "compute_dmigrate"
#: Seconds of load before and after a migration in which the throughput is measured.
CALM = 12.0
_NOTIFICATION = re.compile(
    r"oslo\.messaging\.notification\.dmigrate\.migration\.end .*?(\{.*\})$", re.MULTILINE
)

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """``ram_mb``, ``pool_mb``: of server and buffer pool; ``network``: MB/s; ``rate``: transactions
    a second that sysbench asks for.
    """

    ram_mb: int = 1024
    pool_mb: int = 512
    network: float = 50
    rate: float = 10
    load: str = "oltp_read_write"


class WorkingServer:
    """A database server with its clients at work: load, ledger and probe."""

    def __init__(
        self,
        cloud: OpenStack,
        database: DatabaseServer,
        shape: Shape,
        directory: Path,
        ends: contextlib.ExitStack,
    ) -> None:
        """:param ends: ends the clients."""
        self._cloud, self._database, self._shape = cloud, database, shape
        self.server = server = database.sql_server
        self._probe = ends.enter_context(Probe(server, directory))
        self.ledger = ends.enter_context(Ledger(server, directory))
        argv = command(shape.load, server, shape.pool_mb, shape.rate)
        self._load = ends.enter_context(Load(server, argv, directory))

    def migrate(self, mode: str) -> tuple[Run, str]:
        """Have Nova migrate it to the other host; the run, as reports have it, and what DMigrate
        tells of it as an event of Nova's.

        :raises CloudError: the migration has not completed, or DMigrate has not told of it.
        """
        client, server = self._cloud.client, self._database.server
        client.sdk.compute.set_server_metadata(server.id, dmigrate_policy=POLICIES[mode])
        time.sleep(CALM)
        source = client.host_of(server)
        told = len(notifications(self._cloud, source))
        sent, begin = sum(self._cloud.hosts.link.counters()), time.monotonic()
        client.live_migrate(server)
        end = time.monotonic()
        wire = sum(self._cloud.hosts.link.counters()) - sent
        if client.host_of(server) == source:
            raise CloudError(f"{server.name} is still on {source}")
        time.sleep(CALM)
        silence = self._probe.silence(begin, end)
        summary = self._summary(source, told) if POLICIES[mode] != "disabled" else {}
        before = self._load.tps(begin - CALM + 1, begin)
        run = {
            "scenario": f"Nova, {self._shape.load}",
            "mode": mode,
            "database": RELEASE.flavour,
            "network_mb_s": self._shape.network,
            "pool_share": self._shape.pool_mb / self._shape.ram_mb,
            "completed": True,
            "fallback_reason": summary.get("fallback_reason"),
            "total_s": round(end - begin, 3),
            "downtime_ms": round(silence.downtime * 1e3, 1),
            "guest_bytes": summary.get("guest_bytes"),
            "wire_bytes": wire,
            "volume_bytes": summary.get("volume_bytes", 0),
            "pages_referenced": summary.get("pages_referenced", 0),
            "misses": summary.get("misses", 0),
            "tps_before": round(before, 2),
            "tps_during": round(self._load.tps(begin, end), 2),
            "tps_after": round(self._load.tps(end, end + CALM), 2),
            "recover_90_s": self._load.recovered(end, 0.9 * before),
            "lost_commits": self.ledger.check().lost,
        }
        events = [each for each in client.events(server) if each.startswith(EVENT)]
        if bool(events) != bool(summary):
            raise CloudError(f"{mode}: DMigrate's notification is {summary}, its events {events}")
        return run, "".join(events)

    def _summary(self, source: str, told: int) -> dict[str, Any]:
        """Wait for what DMigrate tells when the database has its settings back.

        :param told: how much it has told before of migrations from that host.
        """
        deadline = time.monotonic() + PATIENCE
        while len(found := notifications(self._cloud, source)) <= told:
            if time.monotonic() > deadline:
                raise CloudError("DMigrate does not tell of the migration")
            time.sleep(1)
        return found[told]

    def stop_clients(self) -> None:
        """Let the clients finish; what they have noted stays."""
        for client in (self._load, self.ledger, self._probe):
            client.stop()


def notifications(cloud: OpenStack, host: str) -> list[dict[str, Any]]:
    """DMigrate's, of the migrations that have left a host: their summaries."""
    log = cloud.site.services.log(cloud.computes[host].nova_compute).read_text(errors="replace")
    return [json.loads(each)["payload"] for each in _NOTIFICATION.findall(log)]

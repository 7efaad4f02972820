# SPDX-License-Identifier: Apache-2.0
"""A database server in a whole OpenStack, live-migrated by Nova: as ever, and through the relays.

Brings up a cloud with two compute hosts, moves a tiny server there and back, then a database
server under load twice in each way. NETWORK (MB/s), RAM, POOL (MiB), RATE and LOAD choose its
shape. Writes openstack-report/.

Exit status: 0 all migrations completed, those through the relays had pages from the volume, and
the database is whole; 1 not so.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from nova_dmigrate.report import format_table
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.demo import POLICIES, Run, Shape, WorkingServer
from tests.lab.openstack.guest import DatabaseServer, tiny
from tests.lab.openstack.sql import table_errors, wait_until_filled
from tests.lab.processes import workspace

REPORT = Path("openstack-report")
_began = time.monotonic()


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"[{time.monotonic() - _began:5.0f} s] {text}", file=sys.stderr, flush=True)


def shape_from_environment() -> Shape:
    """The shape that NETWORK, RAM, POOL, RATE and LOAD choose."""
    usual = Shape()
    chosen = os.environ.get
    return Shape(
        ram_mb=int(chosen("RAM") or usual.ram_mb),
        pool_mb=int(chosen("POOL") or usual.pool_mb),
        network=float(chosen("NETWORK") or usual.network),
        rate=float(chosen("RATE") or usual.rate),
        load=chosen("LOAD") or usual.load,
    )


def move_tiny(cloud: OpenStack) -> None:
    """Move a server that does nothing to the other host and back.

    :raises CloudError: it does not get there.
    """
    server = tiny(cloud, "tiny")
    for _ in range(2):
        begin = time.monotonic()
        cloud.client.live_migrate(server)
        say(f"{server.name} is on {cloud.client.host_of(server)}: {time.monotonic() - begin:.1f} s")
    cloud.client.delete_server(server)


def move_database(cloud: OpenStack, shape: Shape, runs: list[Run]) -> bool:
    """Move a database server there and back in each way; whether its database is whole then.

    :raises CloudError: it does not get there.
    """
    with contextlib.ExitStack() as ends:
        say(f"Creating a server of {shape.ram_mb} MiB with a buffer pool of {shape.pool_mb} MiB")
        database = DatabaseServer(cloud, "db", ram_mb=shape.ram_mb, pool_mb=shape.pool_mb,
                                  load=shape.load).create()  # fmt: skip
        ends.callback(lambda: (cloud.directory / "logs/console.log").write_text(database.console()))
        wait_until_filled(database.sql_server)
        say("Its database has filled its pool; load, ledger and probe begin")
        cloud.hosts.shape(shape.network)
        working = WorkingServer(cloud, database, shape, cloud.directory, ends)
        for mode in POLICIES:
            for _ in range(2):
                run, event = working.migrate(mode)
                runs.append(run)
                say(f"{mode}: {run['total_s']:.1f} s {event}")
        working.stop_clients()
        say("Checking the database")
        entries, wrong = working.ledger.check(), table_errors(working.server)
        for line in wrong:
            say(f"CHECK TABLE: {line}")
        say(f"{entries.acknowledged} commits: {entries.lost} lost, {entries.wrong} rows wrong")
        return entries.ok and not wrong


def _keep_logs(logs: Path) -> None:
    shutil.rmtree(REPORT / "logs", ignore_errors=True)
    if logs.exists():  # otherwise nothing has been started
        shutil.copytree(logs, REPORT / "logs")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    REPORT.mkdir(exist_ok=True)
    runs: list[Run] = []
    whole = False
    with workspace() as directory:
        try:
            with OpenStack(directory, say=say) as cloud:
                say(" ".join(f"{name}: {took:.0f} s;" for name, took in cloud.seconds.items()))
                move_tiny(cloud)
                whole = move_database(cloud, shape_from_environment(), runs)
        except KeyboardInterrupt:
            say("Interrupted; all of it has been removed")
            return 1
        finally:
            _keep_logs(directory / "logs")
    for run in runs:
        run["check_ok"] = whole
    (REPORT / "runs.json").write_text(json.dumps(runs, indent=2) + "\n")
    print(format_table(runs), flush=True)
    from_volume = all(run["pages_referenced"] for run in runs if run["mode"] == "dmigrate")
    return 0 if whole and from_volume else 1


if __name__ == "__main__":
    sys.exit(main())

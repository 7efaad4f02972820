# SPDX-License-Identifier: Apache-2.0
"""A host dies under a database VM: how soon is the database itself again on the other host?

Three times a guest's QEMU is killed under load, and the guest is started on the other host, from a
volume that reads only so much: its agent fills its buffer pool, its server does by itself, or only
its clients do. Prints one table and writes evacuation-report/report.json.

Chosen by environment variables: READS (reads a second of the volume), VOLUME (MB/s that it reads),
and what `make demo` has: DB, RAM, POOL, LOAD, RATE.

Exit status: 0 no acknowledged commit is lost, 1 not so, 2 wrong settings.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt

from tests.lab import database_image
from tests.lab.attached import AttachedDatabase
from tests.lab.database_guest import DatabaseSpec
from tests.lab.demo.clients import ClientError, Server
from tests.lab.demo.compare import say
from tests.lab.demo.ledger import Ledger
from tests.lab.demo.load import Load
from tests.lab.demo.settings import WrongSetting, available_release, number_from, shape_from
from tests.lab.demo.stage import Shape, admit, wait_until_filled
from tests.lab.demo.tables import table_errors
from tests.lab.demo.volume import create_volume
from tests.lab.demo.workloads import command
from tests.lab.domains import Domain
from tests.lab.guest import GuestError
from tests.lab.guest_network import GuestNetwork, guest_address
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import workspace
from tests.lab.relays import wait_until

REPORT = Path("evacuation-report")
#: Who fills the pool.
COLD, OWN, AGENT = "cold", "own", "agent"
MODES = (AGENT, OWN, COLD)
#: As much as the guest's emulated processor can do, for a throughput that the volume limits.
USUAL = {"RAM": "1536", "POOL": "0.5", "VOLUME": "50", "RATE": "0", "READS": "300"}
#: Seconds in which the former throughput is measured, the span in which it has to be back, and the
#: seconds from the power on after which a run ends at the latest.
_FORMER, _WINDOW, _LONGEST = 30.0, 10.0, 400.0
_SHARE = 0.9
#: Seconds from the first answer on of which the throughput is told.
_SPANS = (30, 60)
#: The list that the agent keeps beside the data.
_LIST = "/mnt/data/mysql/ib_buffer_pool"
_PATIENCE = 300.0

Row = dict[str, Any]


class Place:
    """Two hosts, of which one dies, the guest's volume, and its clients. A context manager."""

    def __init__(self, shape: Shape, reads: int, directory: Path) -> None:
        """:param reads: reads a second of the volume, once its host has died."""
        self._shape, self._directory = shape, directory
        self._limits = (
            ("read_iops_sec", reads),
            ("read_bytes_sec", int(shape.volume * 1e6)),
        )
        self._ends = contextlib.ExitStack()
        self.ledger: Ledger | None = None
        enter = self._ends.enter_context
        try:
            self.hosts = enter(LibvirtHosts(directory))
            network = enter(GuestNetwork(self.hosts))
            self.server = Server(host=guest_address(0), clients=network.clients)
            self._spec = DatabaseSpec(
                disk=create_volume(
                    shape.release, shape.load, shape.pool_mb, directory / "volume.raw"
                ),
                release=shape.release,
                ram_mb=shape.ram_mb,
                pool_mb=shape.pool_mb,
                layout="kept",
                address=self.server.host,
            )
        except BaseException:
            self._ends.close()
            raise

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    @contextlib.contextmanager
    def started(
        self, host: LibvirtHost, own_load: bool, limited: bool
    ) -> Iterator[AttachedDatabase]:
        """The guest on a host, whose server answers its clients.

        :param own_load: whether the server fills its pool when it starts.
        :param limited: whether the volume reads only so much.
        """
        load = f"innodb-buffer-pool-load-at-startup={'ON' if own_load else 'OFF'}"
        spec = dataclasses.replace(
            self._spec,
            options=(*database_image.LEAN[self._shape.release.flavour], load),
            limits=self._limits if limited else (),
        )
        with Domain(self.hosts, spec) as domain:
            guest = domain.start(host).guest
            assert isinstance(guest, AttachedDatabase)
            guest.run(admit(self.server))
            if self.ledger is None:
                self.ledger = self._ends.enter_context(Ledger(self.server, self._directory))
            yield guest

    def load(self) -> Load:
        """The load, from now on."""
        shape = self._shape
        argv = command(shape.load, self.server, shape.pool_mb, shape.rate)
        return Load(self.server, argv, self._directory)


def evacuate(place: Place, mode: str) -> Row:
    """Kill the guest under load and start it on the other host; how it went."""
    with place.started(place.hosts.a, own_load=True, limited=False) as guest:
        wait_until_filled(guest)
        with place.load() as load:
            _keep_list(guest)
            time.sleep(_FORMER)
            now = time.monotonic()
            former, pages = load.tps(now - _FORMER + 1, now), _pages(guest)
            say(f"{former:.1f} transactions a second, {pages} pages in the pool; QEMU is killed")
            guest.kill()
    begin = time.monotonic()
    with place.started(place.hosts.b, own_load=mode == OWN, limited=True) as guest:
        if mode == AGENT:
            with guest.agent() as agent:
                agent.warm_up()
        served = time.monotonic() - begin
        filled = recovered = None
        with place.load() as load:
            while time.monotonic() < begin + _LONGEST and None in (filled, recovered):
                time.sleep(1)
                if filled is None and _pages(guest) >= _SHARE * pages:
                    filled = time.monotonic() - begin
                if recovered is None:
                    recovered = load.recovered(begin, _SHARE * former, _WINDOW)
            shares = [load.tps(begin + served, begin + served + span) for span in _SPANS]
        row = {
            "mode": mode,
            "tps_former": round(former, 2),
            "pages": pages,
            "served_s": round(served, 1),
            "recover_90_s": None if recovered is None else round(recovered, 1),
            "pool_90_s": None if filled is None else round(filled, 1),
            **{
                f"share_{span}_s": round(tps / former, 3)
                for span, tps in zip(_SPANS, shares, strict=True)
            },
        }
        if mode == AGENT:
            with guest.agent() as agent:
                row["warm_up"] = agent.warm_up_progress()
        assert place.ledger is not None
        entries, wrong = place.ledger.check(), table_errors(guest)
        row |= {"lost_commits": entries.lost, "check_ok": entries.ok and not wrong}
    return row


def _pages(guest: AttachedDatabase) -> int:
    """How many pages its buffer pool has."""
    return int(guest.sql("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_data'").split()[1])


def _keep_list(guest: AttachedDatabase) -> None:
    """Have the agent make a list of hot pages now: it does when it starts, if there is none."""
    guest.run(
        "agent=$(</run/agent.pid); kill $agent; while kill -0 $agent; do sleep 0.1; done;"
        f" rm -f {_LIST}; touch /run/before; start_agent"
    )
    wait_until(
        lambda: bool(guest.run(f"find {_LIST} -newer /run/before 2>/dev/null || true").strip()),
        "the agent has made a list of hot pages",
        _PATIENCE,
    )


def table(rows: list[Row]) -> str:
    """The rows for people."""
    form = "{:<6} {:>10} {:>8} {:>8} {:>12} {:>13} {:>10} {:>10} {:>6} {:>6}"
    spans = [f"first {span} s" for span in _SPANS]
    heads = ("by", "tps before", "pages", "serves", "90 % of tps", "90 % of pool", *spans)
    lines = [form.format(*heads, "lost", "check")]
    for row in rows:
        times = [row[name] for name in ("served_s", "recover_90_s", "pool_90_s")]
        lines.append(
            form.format(
                row["mode"],
                f"{row['tps_former']:.1f}",
                row["pages"],
                *("-" if each is None else f"{each:.0f} s" for each in times),
                *(f"{row[f'share_{span}_s']:.0%}" for span in _SPANS),
                row["lost_commits"],
                "ok" if row["check_ok"] else "WRONG",
            )
        )
    return "\n".join(lines)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    reason = database_image.unavailable()
    if reason is not None:
        print(f"Nothing can be evacuated here: {reason}", file=sys.stderr)
        return 2
    environment = {**USUAL, **{name: value for name, value in os.environ.items() if value}}
    try:
        shape = shape_from(environment)
        reads = int(number_from(environment, "READS", 0, 1, 1_000_000))
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    shape = dataclasses.replace(shape, release=available_release(shape.release, say))
    try:
        with workspace() as directory, Place(shape, reads, directory) as place:
            rows = _measure(place, shape, reads)
    except KeyboardInterrupt:
        say("Interrupted; all of it has been removed")
        return 1
    except (ClientError, GuestError, TimeoutError, libvirt.libvirtError) as error:
        say(f"It has failed: {error}")
        return 1
    return 0 if all(row["check_ok"] for row in rows) else 1


def _measure(place: Place, shape: Shape, reads: int) -> list[Row]:
    """Evacuate in all ways; prints the table and writes the report, after each of them."""
    rows: list[Row] = []
    known = {"load": shape.load, "reads_s": reads, "volume_mb_s": shape.volume}
    REPORT.mkdir(exist_ok=True)
    for mode in MODES:
        say(f"Evacuating; its pool is filled: {mode}")
        rows.append(evacuate(place, mode))
        # What comes next may fail
        text = json.dumps({**known, "runs": rows}, indent=2) + "\n"
        (REPORT / "report.json").write_text(text)
        print(table(rows), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())

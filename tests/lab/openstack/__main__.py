# SPDX-License-Identifier: Apache-2.0
"""A database server in a whole OpenStack, live-migrated by Nova as ever and through the relays, on
Ceph and on NFS, and what goes wrong meanwhile.

DB, NETWORK (MB/s), RAM, POOL (MiB), RATE and LOAD choose the server's shape, ONLY=part,... rows by
parts of their names. Prints the table of the migrations, and what became of each row; writes
openstack-report/.

Exit status: 0 all is as each row says that it must be; 1 not so; 2 wrong settings.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from nova_dmigrate.report import Section
from tests.lab.demo.compare import Comparison, say
from tests.lab.demo.machine import bare_machine
from tests.lab.demo.settings import (
    WrongSetting,
    available_release,
    choice_from,
    number_from,
    os_memory_mb,
    release_from,
)
from tests.lab.demo.workloads import LOADS
from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.guest import at_broker
from tests.lab.openstack.rows import ROWS, Result, Row, carry_out, check, not_set
from tests.lab.openstack.scene import Scene
from tests.lab.openstack.storage import SharedDirectory
from tests.lab.openstack.working import Shape
from tests.lab.processes import workspace

REPORT = Path("openstack-report")
_KINDS = (CephStorage, SharedDirectory)


def shape_from_environment() -> Shape:
    """The shape that DB, NETWORK, RAM, POOL, RATE and LOAD choose.

    :raises WrongSetting: one of them makes no sense.
    """
    usual, given = Shape(), os.environ
    ram_mb = int(number_from(given, "RAM", usual.ram_mb, 512, os_memory_mb() // 3))
    return Shape(
        ram_mb=ram_mb,
        # The server has more than that, and the system
        pool_mb=int(number_from(given, "POOL", usual.pool_mb, 32, ram_mb // 2)),
        network=number_from(given, "NETWORK", usual.network, 1, 10_000),
        rate=number_from(given, "RATE", usual.rate, 0, 1e6),
        load=choice_from(given, "LOAD", usual.load, LOADS),
        release=release_from(given),
    )


def chosen_rows() -> list[Row]:
    """Those that ONLY names; all if it names none."""
    parts = [part for part in os.environ.get("ONLY", "").split(",") if part]
    return [row for row in ROWS if not parts or any(part in row.name for part in parts)]


def play(rows: Sequence[Row], shape: Shape, comparison: Comparison) -> Iterator[Result]:
    """Carry out rows in a cloud; what became of each, and of the data.

    :param comparison: is given the runs.
    """
    kinds = [kind for kind in _KINDS if any(row.storage == kind.name for row in rows)]
    with workspace() as directory:
        try:
            with OpenStack(directory, kinds, say) as cloud:
                say(" ".join(f"{name}: {took:.0f} s;" for name, took in cloud.seconds.items()))
                for storage in dict.fromkeys(row.storage for row in rows):
                    own = [row for row in rows if row.storage == storage]
                    try:
                        yield from _play_scene(Scene(cloud, storage, shape, say), own, comparison)
                    except Exception as error:  # noqa: BLE001 - the other storage's can be played
                        yield not_set(storage, error)
        finally:
            _keep_logs(directory / "logs")


def _play_scene(scene: Scene, rows: Sequence[Row], comparison: Comparison) -> Iterator[Result]:
    with scene:
        try:
            yield from (carry_out(row, scene) for row in rows)
            yield check(scene)
        finally:
            comparison.runs += scene.runs


def _keep_logs(logs: Path) -> None:
    shutil.rmtree(REPORT / "logs", ignore_errors=True)
    if logs.exists():  # otherwise nothing has been started
        shutil.copytree(logs, REPORT / "logs")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        rows, shape = chosen_rows(), shape_from_environment()
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print(f"ONLY names none of: {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    REPORT.mkdir(exist_ok=True)
    release = available_release(shape.release, say, at_broker)
    if os.environ.get("DB") and release is not shape.release:
        print(f"There is no {shape.release.flavour} here", file=sys.stderr)
        return 1
    shape = dataclasses.replace(shape, release=release)
    machine = {
        **bare_machine(),
        "guest": f"{shape.ram_mb} MiB of RAM, 1 emulated processor",
        "server": f"{release.flavour} {'.'.join(map(str, release.version))}",
        "pool_mib": shape.pool_mb,
        "nova": version("nova"),
    }
    comparison, results = Comparison(machine=machine), list[Result]()
    ended = False
    with contextlib.suppress(KeyboardInterrupt):
        for result in play(rows, shape, comparison):
            results.append(result)
            say(str(result))
        ended = True
    if not ended:
        say("Interrupted; all of it has been removed")
    comparison.details[:] = [result.to_dict() for result in results]
    lines = tuple(map(str, results))
    comparison.write(REPORT, [Section("What must be true, and what was", lines)])
    print("\n".join(lines), flush=True)
    return 0 if ended and not any(result.wrong for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Many loads, sizes and troubles, each with all ways to migrate; writes scenarios-report/.

Chosen by environment variables: ONLY (scenarios: a whole name chooses that one, what is none is
split at its commas, and what then is none either chooses all whose names have it as a part; several
choices have semicolons between them), MODES (pre-copy, auto-converge, post-copy, multifd-zstd,
dmigrate; with commas between them), NETWORK and VOLUME in MB/s,
DB (mysql, mariadb), RAM (MiB of a guest; several guests have half of it), RATE (transactions a
second that sysbench asks for), POOLS (shares of RAM), COMPRESSION (yes, no: whether relays may),
DEADLINE (seconds within which an evicted host should be empty; by default what the network needs
for all memory of its guests), KEEP (yes: what the report there has of other scenarios stays in it,
so that what takes hours can be done in parts).

One guest plays all scenarios that want the same load and sizes; the report is written after each
guest. Where one of them fails, that is told, what it has finished counts, and the next guest goes
on. Exit status: 0 all databases are whole, 1 not so or something has failed, 2 wrong settings.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.lab import database_image
from tests.lab.demo.compare import Comparison, Scenario, compare, say
from tests.lab.demo.load import SYSBENCH_LOADS
from tests.lab.demo.measure import MODES, POST_COPY
from tests.lab.demo.remote_volume import shared_link
from tests.lab.demo.settings import (
    WrongSetting,
    available_release,
    choice_from,
    number_from,
    shape_from,
)
from tests.lab.demo.stage import Shape
from tests.lab.demo.troubles import background_traffic, failing_volume, narrow_network
from tests.lab.demo.workloads import TPCC
from tests.lab.processes import workspace

REPORT = Path("scenarios-report")
_POOLS = "0.25,0.5,0.75"
#: MiB of a guest in which a pool of three quarters has room.
_RAM = "2560"
#: MB/s at which such a guest takes as long as one of 128 GiB does on 10 Gbit/s.
_NETWORK = _VOLUME = "25"
_EVICTED = 2
_FAST = "storage twice as fast"


def scenarios(usual: Shape, pools: Sequence[float], deadline: float) -> Iterator[Scenario]:
    """All there are; those that the same guests can play come one after the other.

    :param usual: shape of those that do not vary it.
    :param deadline: seconds within which an evicted host should be empty.
    """
    most = dataclasses.replace(usual, pool=pools[-1])
    for load in SYSBENCH_LOADS:
        yield Scenario(load, dataclasses.replace(most, load=load), MODES)
        if load == usual.load:
            yield from _in_trouble(most)
    tpcc = dataclasses.replace(most, load=TPCC)
    yield Scenario(TPCC, tpcc, MODES)
    yield Scenario(f"{TPCC}, {_FAST}", dataclasses.replace(tpcc, volume=2 * usual.network), MODES)
    for pool in pools[:-1]:
        yield Scenario(usual.load, dataclasses.replace(usual, pool=pool), MODES)
    half = _half(usual)
    yield Scenario("eviction of 2 in turn", half, MODES, _EVICTED, deadline=deadline)
    yield Scenario("batch of 2 at once", half, MODES, guests=_EVICTED, at_once=True)


def _in_trouble(usual: Shape) -> Iterator[Scenario]:
    fast = dataclasses.replace(usual, volume=2 * usual.network)
    yield Scenario(f"{usual.load}, {_FAST}", fast, MODES)
    slow = dataclasses.replace(usual, volume=usual.network / 2)
    yield Scenario("slow storage", slow, MODES)
    yield Scenario("background traffic", usual, MODES, trouble=background_traffic)
    yield Scenario("network drops and returns", usual, MODES, trouble=narrow_network)
    # Of a guest that runs at the destination already, its own disk would fail
    modes = tuple(mode for mode in MODES if mode != POST_COPY)
    yield Scenario("storage fails midway", usual, modes, trouble=failing_volume)
    # What the volume brings, the network has to carry: there is no bandwidth of its own
    same = dataclasses.replace(usual, volume=0)
    yield Scenario("storage on the same link", same, MODES, trouble=shared_link)


def _half(usual: Shape) -> Shape:
    """That of each of several guests."""
    return dataclasses.replace(usual, ram_mb=usual.ram_mb // 2)


def _usual_deadline(usual: Shape) -> float:
    """Seconds that the network needs for all memory of the guests of an evicted host."""
    return _EVICTED * (_half(usual).ram_mb << 20) / (usual.network * 1e6)


def _chosen(usual: Shape, environment: Mapping[str, str]) -> list[Scenario]:
    """:raises WrongSetting: a variable names what there is not."""
    pools = []
    for share in _parts(environment.get("POOLS") or _POOLS):
        setting = {"POOL": share, "RAM": str(usual.ram_mb), "DB": usual.release.flavour}
        pools.append(shape_from(setting).pool)
    deadline = number_from(environment, "DEADLINE", _usual_deadline(usual), 0, 86400)
    found = list(scenarios(usual, pools, deadline))
    names = dict.fromkeys(each.name for each in found)
    wanted = _named(environment.get("ONLY", ""), list(names))
    modes = _parts(environment.get("MODES", ""))
    for mode in modes:
        if mode not in MODES:
            raise WrongSetting(f"MODES: {mode!r} is not one of {', '.join(MODES)}")
    return [
        dataclasses.replace(
            each, modes=tuple(mode for mode in each.modes if not modes or mode in modes)
        )
        for each in found
        if not wanted or each.name in wanted
    ]


def _named(text: str, names: Sequence[str]) -> set[str]:
    """Names that ONLY chooses; none of them if it is empty.

    :raises WrongSetting: something in it chooses none.
    """
    wanted = set()
    for choice in _parts(text, ";"):
        # Names have commas, too
        for part in [choice] if choice in names else _parts(choice):
            of_part = {part} if part in names else {name for name in names if part in name}
            if not of_part:
                raise WrongSetting(f"ONLY: {part!r} is in none of {'; '.join(names)}")
            wanted |= of_part
    return wanted


def _parts(text: str, separator: str = ",") -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _play(chosen: Sequence[Scenario], result: Comparison, report: Path) -> bool:
    """Play scenarios, and write the report after each guest; whether none of them has failed."""
    failed: list[str] = []
    done = 0
    for _, played in itertools.groupby(chosen, lambda each: (each.guests, each.shape.guest)):
        together = list(played)
        names = "; ".join(each.name for each in together)
        say(f"{done + 1} to {done + len(together)} of {len(chosen)} scenarios: {names}")
        done += len(together)
        with _told(failed), workspace() as directory:
            compare(together, directory, result)
        if result.runs:
            with _told(failed):
                result.write(report)
    return not failed


@contextlib.contextmanager
def _told(failed: list[str]) -> Iterator[None]:
    """An error in here is told and added; what follows goes on."""
    try:
        yield
    except Exception:  # noqa: BLE001 - it may be of anything: libvirt, QEMU, a program, a file
        failed.append(traceback.format_exc())
        say(f"It has failed: {failed[-1]}")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    reason = database_image.unavailable()
    if reason is not None:
        print(f"Scenarios cannot run here: {reason}", file=sys.stderr)
        return 2
    try:
        usual = shape_from(
            {
                "RAM": _RAM,
                "NETWORK": _NETWORK,
                "VOLUME": _VOLUME,
                **{name: text for name, text in os.environ.items() if text},
            }
        )
        chosen = _chosen(usual, os.environ)
        keep = choice_from(os.environ, "KEEP", "no", ("yes", "no")) == "yes"
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    release = available_release(usual.release, say)
    chosen = [
        dataclasses.replace(each, shape=dataclasses.replace(each.shape, release=release))
        for each in chosen
    ]
    result = Comparison.read(REPORT) if keep else Comparison()
    well = False
    try:
        well = _play(chosen, result, REPORT)
    except KeyboardInterrupt:
        say("Interrupted; all of it has been removed")
        if result.runs:
            result.write(REPORT)
    return 0 if result.whole and well else 1


if __name__ == "__main__":
    sys.exit(main())

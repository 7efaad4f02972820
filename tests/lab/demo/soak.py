# SPDX-License-Identifier: Apache-2.0
"""Many migrations back and forth under load, and drills: no lost commit, no leak, nothing left.

Chosen by environment variables: COUNT (migrations; 0 for none), DRILLS (all, none, or parts of
names with commas between), and what `make demo` has: DB, NETWORK, VOLUME, POOL, LOAD, RAM.

Exit status: 0 all went well, 1 not so, 2 wrong settings.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.migration.request import Mode
from nova_dmigrate.migration.summary import COMPLETED, DMIGRATE
from tests.lab import database_image
from tests.lab.demo import drills
from tests.lab.demo.compare import say
from tests.lab.demo.footprint import FEW, Footprint
from tests.lab.demo.scene import HASTY, Scene
from tests.lab.demo.settings import WrongSetting, available_release, shape_from
from tests.lab.demo.stage import Shape, Stage
from tests.lab.demo.tables import table_errors
from tests.lab.processes import workspace

#: A guest that is there in seconds, and has a pool worth a map.
USUAL = {"RAM": "1024", "POOL": "0.25", "NETWORK": "100", "VOLUME": "200", "COUNT": "50"}
#: Migrations after which all that is made only once has been made.
WARM_UP = 2
#: Seconds for what has just ended to be gone.
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Soak:
    """``trouble``: what went wrong, leaks included, in sentences. ``table``: what the hosts'
    programs took at first, after a half, and in the end.
    """

    trouble: tuple[str, ...]
    table: str


def soak(scene: Scene, count: int, say: Callable[[str], None] = lambda text: None) -> Soak:
    """Migrate there and back until ``count`` migrations have been, an even number.

    What the second half adds to what programs take is a leak; if that were too few to tell, what
    the last few add. It ends early when a migration is not as it should be.
    """
    trouble: list[str] = []
    first = middle = last = Footprint.of(scene, 0)
    # The guest is on the same host as at the end
    half = max(WARM_UP, min(WARM_UP + (count - WARM_UP) // 4 * 2, count - FEW))
    for number in range(1, count + 1):
        try:
            summary = scene.migrate(mode=Mode.REQUIRED)
        except exception.FallBack as error:
            trouble.append(f"migration {number}: {error}")
            break
        say(f"{number}: {summary.sentence()}")
        if (summary.state, summary.mode) != (COMPLETED, DMIGRATE):
            trouble.append(f"migration {number} {summary.state}: {summary.error}")
        trouble += [f"migration {number}: {each}" for each in scene.trouble(summary)]
        if trouble:
            break
        if number == WARM_UP:
            first = Footprint.of(scene, number)
        if number == half:
            middle = _calm(scene, number)
    end = time.monotonic() + _PATIENCE
    while not trouble and (last := Footprint.of(scene, count)).leaks(middle):
        if time.monotonic() > end:
            trouble += last.leaks(middle)
        time.sleep(1)
    trouble += [f"CHECK TABLE: {line}" for line in table_errors(scene.guest)]
    return Soak(tuple(trouble), last.table(first, middle))


def _calm(scene: Scene, after: int) -> Footprint:
    """The footprint when what belongs to the last migration has gone, which would else hide a
    leak.
    """
    found, end = Footprint.of(scene, after), time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        time.sleep(1)
        later = Footprint.of(scene, after)
        if not later.shrank(found):
            break
        found = later
    return found


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    reason = database_image.unavailable()
    if reason is not None:
        print(f"The soak cannot run here: {reason}", file=sys.stderr)
        return 2
    environment = {**USUAL, **{name: value for name, value in os.environ.items() if value}}
    try:
        shape, count = shape_from(environment), _count(environment["COUNT"])
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    chosen = _chosen(environment.get("DRILLS", "all"))
    try:
        shape = dataclasses.replace(shape, release=available_release(shape.release, say))
        with workspace() as directory:
            return 0 if _run(shape, count, chosen, directory) else 1
    except KeyboardInterrupt:
        say("Interrupted; all of it has been removed")
        return 1


def _run(shape: Shape, count: int, chosen: list[drills.Drill], directory: Path) -> bool:
    """Soak, then drill; whether all went well."""
    well = True
    with Stage(shape, directory, say, **HASTY) as stage:
        scene = Scene.of(stage)
        if count:
            done = soak(scene, count, say)
            print(done.table, flush=True)
            well = _tell(done.trouble)
        for number, drill in enumerate(chosen, 1):
            outcome = drills.carry_out(drill, scene)
            say(f"drill {number} of {len(chosen)}: {outcome}")
            well = _tell(outcome.trouble) and well
        for guest in stage.guests:
            guest.stop_clients()
        entries = scene.ledger.check()
        say(f"{entries.acknowledged} commits were acknowledged, {entries.lost} are lost")
        wrong = [f"CHECK TABLE: {line}" for line in table_errors(scene.guest)]
        well = _tell(wrong) and entries.ok and well
    say("All is well" if well else "Not all is well")
    return well


def _tell(trouble: tuple[str, ...] | list[str]) -> bool:
    """Tell of trouble; whether there was none."""
    for each in trouble:
        say(f"TROUBLE: {each}")
    return not trouble


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) % 2 or int(text) == WARM_UP:
        raise WrongSetting(f"COUNT={text} is not 0, or an even number beyond {WARM_UP}")
    return int(text)


def _chosen(text: str) -> list[drills.Drill]:
    if text == "none":
        return []
    parts = [""] if text == "all" else text.split(",")
    return [drill for drill in drills.MATRIX if any(part in str(drill) for part in parts)]


if __name__ == "__main__":
    sys.exit(main())

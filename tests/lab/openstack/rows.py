# SPDX-License-Identifier: Apache-2.0
"""What `make openstack` does, row by row, and what must be true after each."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tests.lab.openstack import troubles
from tests.lab.openstack.comparison import Compared
from tests.lab.openstack.deeds import FAST, SLOW, Deed, Emptied, Migrated
from tests.lab.openstack.evacuation import STARTS, STOPS, Evacuated
from tests.lab.openstack.isolation import Isolated
from tests.lab.openstack.move import CANCELLED
from tests.lab.openstack.scene import CEPH, NFS, Scene
from tests.lab.openstack.truths import Truth, Way
from tests.lab.openstack.working import DMIGRATE, STOCK


@dataclasses.dataclass(frozen=True)
class Result:
    """``must``, ``was``: in sentences; ``wrong``: what of it must not be."""

    row: str
    must: str
    was: str
    wrong: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else "ok"
        return f"{self.row}: {verdict} (must be: {self.must}; was: {self.was})"


@dataclasses.dataclass(frozen=True)
class Row:
    """Something is done with the database server on a storage, under load."""

    name: str
    storage: str
    deed: Deed


_VOLUME = Truth(Way.VOLUME)
#: A volume that fails may not be read any more for the rest of a migration.
_SOME_OF_IT = Truth(Way.VOLUME, matched=0)


def _there_and_back(storage: str) -> Iterator[Row]:
    for name, mode, truth in (("stock", STOCK, Truth(Way.STOCK)), ("DMigrate", DMIGRATE, _VOLUME)):
        for way in ("there", "back"):
            yield Row(f"{storage}, {name} {way}", storage, Migrated(mode, truth))


def _in_trouble(trouble: troubles.Trouble, truth: Truth, network: float) -> Migrated:
    return Migrated(DMIGRATE, truth, trouble, network)


_NO_AGENT = Truth(Way.BARE, "agent-unreachable")
_TROUBLES: dict[str, Deed] = {
    "abort": _in_trouble(troubles.abort, Truth(Way.VOLUME, status=CANCELLED), SLOW),
    "after the abort": Migrated(DMIGRATE, _VOLUME),
    "batch": Emptied(DMIGRATE, _VOLUME),
    "agent missing": _in_trouble(troubles.agent_stopped, _NO_AGENT, FAST),
    "wrong credentials": _in_trouble(troubles.wrong_password, _NO_AGENT, FAST),
    "host service missing": _in_trouble(
        troubles.no_host_service, Truth(Way.ORDINARY, "host-unreachable"), FAST
    ),
    "Ceph refuses DMigrate": _in_trouble(
        troubles.wrong_keyring, Truth(Way.ORDINARY, "volumes-unreadable"), FAST
    ),
    "Ceph slow": _in_trouble(troubles.slow_ceph, _SOME_OF_IT, SLOW),
    "OSD restarted": _in_trouble(troubles.osd_restarted, _SOME_OF_IT, SLOW),
    "broker isolation": Isolated(),
    # An evacuation is a new start: what is in memory is gone
    "memory and volume": Compared(_VOLUME),
    "evacuation": Evacuated(STARTS),
    "evacuation, started by hand": Evacuated(STOPS),
    "memory and volume after evacuations": Compared(_VOLUME),
}
#: Those of one storage come together: a server is made for them.
ROWS = (
    *_there_and_back(CEPH),
    *(Row(f"{CEPH}, {name}", CEPH, deed) for name, deed in _TROUBLES.items()),
    *_there_and_back(NFS),
    Row(f"{NFS}, memory and volume", NFS, Compared(_VOLUME)),
)


def carry_out(row: Row, scene: Scene) -> Result:
    """Carry out a row, and look at what must be true after any of them."""
    scene.say(row.name)
    try:
        scene.mend()
        done = row.deed(scene)
        if done.run is not None:
            scene.runs.append(done.run)
        was, wrong = done.was, done.wrong + scene.wrong_with_server()
    except Exception as error:  # noqa: BLE001 - the others are to be carried out as well
        was, wrong = _unfinished(error)
    return Result(row.name, str(row.deed), was, tuple(wrong))


def check(scene: Scene) -> Result:
    """Look at the data of a scene, whose rows have all been carried out."""
    scene.say("Checking the database")
    try:
        scene.mend()
        wrong = scene.wrong_with_data()
        for run in scene.runs:
            run["check_ok"] = not wrong and run.get("check_ok", True)
        was = f"{scene.working.ledger.acknowledged()} commits were acknowledged"
    except Exception as error:  # noqa: BLE001 - there may be other scenes
        was, wrong = _unfinished(error)
    return Result(
        f"{scene.storage}, the data at the end",
        "no table has errors, no commit is lost",
        was,
        tuple(wrong),
    )


def not_set(storage: str, error: Exception) -> Result:
    """There is no scene for a storage's rows."""
    was, wrong = _unfinished(error)
    return Result(f"{storage}, its server", "it works", was, tuple(wrong))


def _unfinished(error: Exception) -> tuple[str, list[str]]:
    return "not carried out to its end", [f"{type(error).__name__}: {error}"]

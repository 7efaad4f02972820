# SPDX-License-Identifier: Apache-2.0
"""Drills: a process is killed in one phase of a migration, or the migration is cancelled.

Whatever it is, the guest lives on one side alone, its database has all that it has acknowledged,
nothing is left behind, and the next migration goes through the relays.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable

from nova_dmigrate import exception
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import Mode
from nova_dmigrate.migration.summary import (
    CANCELLED,
    COMPLETED,
    DMIGRATE,
    FAILED,
    MigrationSummary,
)
from tests.lab.demo.scene import Scene
from tests.lab.guest import GuestError
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.relays import wait_until

CANCEL = "cancel"
#: Meanwhile, and for a while in the next, the guest's database is prepared and its memory mapped.
EARLY = ("checking", "waiting", "starting relays")
PHASES = (*EARLY, "migrating", "converging")
#: Seconds after which it happens in phases that take a while: they have begun to do something.
_LATER = {"starting relays": 0.1}
#: MB/s until it has happened, so that there is time in the middle, and bytes that make the middle.
_SLOW, _MIDDLE = 60, 48 << 20
#: How often it is tried to come to a phase that may be over too soon.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Drill:
    """``victim``: what is killed; or `CANCEL`. ``phase``: of `PHASES`."""

    victim: str
    phase: str

    def __str__(self) -> str:
        return f"{self.victim} {'' if self.victim == CANCEL else 'killed '}while {self.phase}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a drill went. ``landed``: the phase in which it had happened; ``trouble``: what must not
    be, in sentences.
    """

    drill: Drill
    landed: str
    summary: MigrationSummary
    trouble: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        reason, summary = self.summary.fallback_reason, self.summary
        return (
            f"{self.drill} (it was {self.landed or 'over'}): {summary.state}, {summary.mode}"
            f"{f', {reason}' if reason else ''}; {self.seconds:.0f} s with the next one"
        )


#: By victim: phases in which it is there, or matters; and the ends that a migration may come to.
_DRILLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "source relay": (PHASES[2:], (COMPLETED,)),
    "destination relay": (PHASES[2:], (COMPLETED,)),
    "source service": (PHASES, (COMPLETED,)),
    "destination service": (PHASES, (COMPLETED,)),
    "agent": (PHASES, (COMPLETED,)),
    "broker": (PHASES, (COMPLETED,)),
    "database server": (PHASES, (COMPLETED,)),
    "source libvirtd": (PHASES, (COMPLETED, FAILED)),
    "destination libvirtd": (PHASES, (COMPLETED, FAILED)),
    # A finished switchover stands
    CANCEL: (PHASES, (CANCELLED, COMPLETED)),
}
MATRIX = tuple(Drill(victim, phase) for victim, (phases, _) in _DRILLS.items() for phase in phases)


def carry_out(drill: Drill, scene: Scene, once_more: bool = True) -> Outcome:
    """Carry out a drill.

    :param once_more: migrate once more, through the relays, if nothing is wrong yet.
    """
    began, settings = time.monotonic(), scene.settings()
    for _ in range(_ATTEMPTS):
        blow = _Blow(drill, scene)
        scene.hosts.shape(_SLOW)
        try:
            summary = scene.migrate(on_progress=blow.told, cancelled=blow.cancelled)
        finally:
            blow.recover()
            scene.hosts.shape(None)
        trouble = [*blow.trouble, *scene.trouble(summary, settings)]
        if blow.landed or trouble:
            break
    else:
        trouble.append(f"it never came to {drill.phase}: {summary}")
    if summary.state not in _DRILLS[drill.victim][1]:
        trouble.append(f"it {summary.state}: {summary.error}")
    if once_more and not trouble:
        trouble = _next(scene, settings)
    return Outcome(drill, blow.landed, summary, tuple(trouble), time.monotonic() - began)


def _next(scene: Scene, settings: str) -> list[str]:
    """What is wrong with the migration that follows."""
    try:
        summary = scene.migrate(mode=Mode.REQUIRED)
    except exception.FallBack as error:
        return [f"the next one would have been the ordinary one: {error}"]
    if (summary.state, summary.mode) != (COMPLETED, DMIGRATE):
        return [f"the next one: {summary}"]
    return [f"the next one: {each}" for each in scene.trouble(summary, settings)]


class _Blow:
    """Happens once, when a phase is told; what was killed is brought back, as a supervisor does."""

    def __init__(self, drill: Drill, scene: Scene) -> None:
        self.cancelled = threading.Event()
        self.landed = ""
        self.trouble: list[str] = []
        self._drill = drill
        self._scene = scene
        self._phase = ""
        self._thread: threading.Thread | None = None

    def told(self, progress: Progress) -> None:
        """The migration has come so far."""
        self._phase = progress.phase
        if self._thread is not None or progress.phase != self._drill.phase:
            return
        if progress.phase == "migrating" and progress.guest_bytes < _MIDDLE:
            return
        struck = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(struck,), name="drill")
        self._thread.start()
        if progress.phase not in _LATER:
            struck.wait()

    def recover(self) -> None:
        """After the migration: wait until all runs again."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, struck: threading.Event) -> None:
        kill, revive = self._means()
        try:
            time.sleep(_LATER.get(self._drill.phase, 0))
            try:
                kill()
                self.landed = self._phase
            finally:
                struck.set()
            revive()
            self._scene.hosts.shape(None)
        except Exception as error:  # noqa: BLE001 - told with the drill's outcome
            self.trouble.append(f"the drill itself failed: {error!r}")

    def _means(self) -> tuple[Callable[[], None], Callable[[], object]]:
        """What kills the victim, and what brings it back."""
        scene, (side, _, kind) = self._scene, self._drill.victim.partition(" ")
        services = scene.services
        host = scene.domain.host if side == "source" else scene.hosts.other(scene.domain.host)
        means: dict[str, tuple[Callable[[], None], Callable[[], object]]] = {
            "relay": (lambda: _kill_relay(scene, host), _nothing),
            "service": (lambda: services.kill(host), lambda: services.start(host)),
            "libvirtd": (host.kill_libvirtd, host.start_libvirtd),
            "agent": (lambda: _kill_inside(scene, "agent", "start_agent"), _nothing),
            "server": (lambda: _kill_inside(scene, "server", scene.revival), _nothing),
            "broker": (services.broker.kill, services.broker.start),
            CANCEL: (self.cancelled.set, _nothing),
        }
        return means[kind or side]


def _kill_relay(scene: Scene, host: LibvirtHost) -> None:
    (pid,) = wait_until(lambda: scene.relays(host), f"{host.name} has a relay")
    os.kill(pid, signal.SIGKILL)


def _kill_inside(scene: Scene, name: str, revival: str) -> None:
    """Kill what the guest has the number of, and let the guest bring it back a moment later."""
    quietly = "</dev/null >/tmp/revival.log 2>&1 3>&-"
    # When the guest has moved before it could answer, it has been done all the same
    with contextlib.suppress(GuestError):
        scene.guest.run(f"kill -KILL $(</run/{name}.pid); (sleep 1; {revival}) {quietly} &")


def _nothing() -> None:
    """What was struck comes back by itself, or never."""

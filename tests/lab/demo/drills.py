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
from collections.abc import Callable, Iterator, Mapping

import libvirt

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
from tests.lab.demo.scene import DOWNTIME_MS, Scene
from tests.lab.guest import GuestError
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.relays import wait_until

CANCEL = "cancel"
#: Before memory is sent. Once there is a place for the relays, the guest's database is prepared and
#: its memory mapped, which may go on while memory is sent.
EARLY = ("checking", "waiting", "starting relays")
MIGRATING, CONVERGING = "migrating", "converging"
PHASES = (*EARLY, MIGRATING, CONVERGING)
#: MB/s until it has happened, so that there is time in the middle, and bytes that make the middle.
_SLOW, _MIDDLE = 60, 48 << 20
#: The downtime limit, in ms, with which a guest that changes its memory does not switch over; the
#: MB/s at which even one that others let run only now and then changes it between two rounds; and
#: the MB that it changes.
_HELD = 1
_CRAWL = 8
_CHANGED_MB = 8
#: It changes so many MB as quickly as others let it.
CHANGES = """
head -c {}M /dev/urandom >/tmp/changes
(while [ -e /tmp/changes ]; do dd if=/tmp/changes of=/tmp/changed bs=1M conv=notrunc; done
rm /tmp/changed) </dev/null >/dev/null 2>&1 3>&- &
renice -n 19 $!
"""
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
        why = ends(self.drill).get(summary.state)
        return (
            f"{self.drill} (it was {self.landed or 'over'}): {summary.state}, {summary.mode}"
            f"{f', {reason}' if reason else ''}{f'; {why}' if why else ''};"
            f" {self.seconds:.0f} s with the next one"
        )


#: By victim: phases in which it is there, or matters.
_DRILLS: dict[str, tuple[str, ...]] = {
    "source relay": PHASES[2:],
    "destination relay": PHASES[2:],
    "source service": PHASES,
    "destination service": PHASES,
    "agent": PHASES,
    "broker": PHASES,
    "database server": PHASES,
    "source libvirtd": PHASES,
    "destination libvirtd": PHASES,
    CANCEL: PHASES,
}
MATRIX = tuple(Drill(victim, phase) for victim, phases in _DRILLS.items() for phase in phases)


def ends(drill: Drill) -> Mapping[str, str]:
    """The states that a migration may come to, and why, where that is not plain."""
    if drill.victim == CANCEL:
        if drill.phase == CONVERGING:
            return {CANCELLED: "", COMPLETED: "a switchover that has begun stands"}
        return {CANCELLED: ""}
    if _is_libvirtd(drill) and drill.phase not in EARLY:
        return {COMPLETED: "", FAILED: "a migration ends with a libvirtd that carries it out"}
    return {COMPLETED: ""}


def _is_libvirtd(drill: Drill) -> bool:
    return drill.victim.endswith("libvirtd")


def carry_out(drill: Drill, scene: Scene, once_more: bool = True) -> Outcome:
    """Carry out a drill.

    :param once_more: migrate once more, through the relays, if nothing is wrong yet.
    """
    began = time.monotonic()
    for _ in range(_ATTEMPTS):
        blow = _Blow(drill, scene)
        scene.hosts.shape(_SLOW)
        with _held_back(scene) if drill.phase == CONVERGING else _as_it_is() as limit:
            try:
                summary = scene.migrate(
                    on_progress=blow.told, cancelled=blow.cancelled, max_downtime_ms=limit
                )
            finally:
                blow.recover()
                scene.hosts.shape(None)
            trouble = [*blow.trouble, *scene.trouble(summary)]
        if blow.landed == drill.phase or trouble:
            break
    else:
        came = f"came while it was {blow.landed}" if blow.landed else "never came"
        trouble.append(f"{drill}: that {came}: {summary}")
    if summary.state not in ends(drill):
        trouble.append(f"it {summary.state}: {summary.error}")
    if once_more and not trouble:
        trouble = _next(scene)
    return Outcome(drill, blow.landed, summary, tuple(trouble), time.monotonic() - began)


@contextlib.contextmanager
def _as_it_is() -> Iterator[int]:
    """Gives the downtime limit in ms."""
    yield DOWNTIME_MS


@contextlib.contextmanager
def _held_back(scene: Scene) -> Iterator[int]:
    """The guest does not switch over at the limit that this gives, but soon with the usual one."""
    scene.guest.run(CHANGES.format(_CHANGED_MB))
    try:
        yield _HELD
    finally:
        # Where it is by then, unless that is the trouble
        with contextlib.suppress(GuestError):
            scene.guest.run("rm /tmp/changes")


def _next(scene: Scene) -> list[str]:
    """What is wrong with the migration that follows."""
    try:
        summary = scene.migrate(mode=Mode.REQUIRED)
    except exception.FallBack as error:
        return [f"the next one would have been the ordinary one: {error}"]
    if (summary.state, summary.mode) != (COMPLETED, DMIGRATE):
        return [f"the next one: {summary}"]
    return [f"the next one: {each}" for each in scene.trouble(summary)]


class _Blow:
    """Happens once, when a phase is told; what was killed is brought back, as a supervisor does.

    The migration's steps wait meanwhile, not QEMU. ``landed``: in which phase it was by then.
    """

    def __init__(self, drill: Drill, scene: Scene) -> None:
        self.cancelled = threading.Event()
        self.landed = ""
        self.trouble: list[str] = []
        self._drill = drill
        self._scene = scene
        self._source = scene.domain.host
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def told(self, progress: Progress) -> None:
        """The migration has come so far."""
        if self._thread is not None or not self._is_due(progress):
            return
        if self._drill.phase == CONVERGING:
            self._scene.hosts.shape(_CRAWL)
        struck = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(struck,), name="drill")
        self._thread.start()
        struck.wait()

    def recover(self) -> None:
        """After the migration: wait until all runs again."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _is_due(self, progress: Progress) -> bool:
        """Whether it is in the midst of the phase, of a migration through relays."""
        if progress.phase != self._drill.phase:
            return False
        if progress.phase == MIGRATING and progress.guest_bytes < _MIDDLE:
            return False
        # The one that is started last
        return progress.phase in EARLY[:2] or bool(self._scene.relays(self._source))

    def _run(self, struck: threading.Event) -> None:
        kill, revive = self._means()
        try:
            try:
                kill()
                self.landed = "over" if self._has_moved() else self._drill.phase
                # Without libvirt there is no migration, of whatever kind
                if _is_libvirtd(self._drill) and self._drill.phase in EARLY:
                    revive()
                    revive = _nothing
            finally:
                struck.set()
            revive()
            if self._drill.victim == CANCEL:
                return  # the migration's steps are to see it before QEMU is quick
            self._scene.hosts.shape(None)
            if self._drill.phase == CONVERGING:
                self._let_switch_over()
        except Exception as error:  # noqa: BLE001 - told with the drill's outcome
            self.trouble.append(f"the drill itself failed: {error!r}")

    def _has_moved(self) -> bool:
        """Whether the guest runs at the destination: QEMU does not wait for the steps' next one."""
        domain, here = self._scene.domain, self._drill.victim != "source libvirtd"
        asked = self._source if here else self._scene.hosts.other(self._source)
        try:
            state, _ = domain.on(asked).state()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            state = libvirt.VIR_DOMAIN_SHUTOFF
        return here != (state == libvirt.VIR_DOMAIN_RUNNING)

    def _let_switch_over(self) -> None:
        """Until it has: the migration may be one that was begun anew."""
        while not self._over.wait(0.3):
            with contextlib.suppress(libvirt.libvirtError):
                self._scene.domain.set_max_downtime(DOWNTIME_MS)

    def _means(self) -> tuple[Callable[[], None], Callable[[], object]]:
        """What kills the victim, and what brings it back."""
        scene, (side, _, kind) = self._scene, self._drill.victim.partition(" ")
        services = scene.services
        host = self._source if side == "source" else scene.hosts.other(self._source)
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

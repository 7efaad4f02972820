# SPDX-License-Identifier: Apache-2.0
"""Migrations of guests at work, and what they have cost: a run of report.json."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import libvirt
import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.migration.summary import COMPLETED, MigrationSummary
from nova_dmigrate.migration.summary import DMIGRATE as THROUGH_RELAYS
from nova_dmigrate.report.history import run_of
from tests.lab.demo.load import SYSBENCH_LOADS, Load
from tests.lab.demo.stage import Content, Stage, WorkingGuest
from tests.lab.domains import FLAGS
from tests.lab.hosts import HostPair

Run = dict[str, Any]

PRE_COPY, AUTO_CONVERGE, POST_COPY = "pre-copy", "auto-converge", "post-copy"
MULTIFD, DMIGRATE = "multifd-zstd", "dmigrate"
MODES = (PRE_COPY, AUTO_CONVERGE, POST_COPY, MULTIFD, DMIGRATE)

#: Seconds before and after a migration in which the throughput is measured.
CALM = 12.0
#: Seconds after which the throughput is given up to come back.
RECOVERY_PATIENCE = 60.0
#: Seconds that the load gets to make up for an outage.
BACKLOG_PATIENCE = 120.0
#: Seconds around the switchover in which a client's longest silence is the downtime. QEMU stops the
#: guest once more, when it begins to log what the guest writes: that is no downtime, but is told.
AROUND = 4.0
_FLAGS = {
    PRE_COPY: FLAGS,
    AUTO_CONVERGE: FLAGS | libvirt.VIR_MIGRATE_AUTO_CONVERGE,
    POST_COPY: FLAGS | libvirt.VIR_MIGRATE_POSTCOPY,
    MULTIFD: FLAGS | libvirt.VIR_MIGRATE_PARALLEL,
}


@dataclasses.dataclass
class _Outcome:
    """One guest's migration, as whoever carried it out tells of it. Times by time.monotonic()."""

    begin: float
    end: float = 0.0
    completed: bool = False
    switched: float | None = None
    error: str | None = None
    guest_bytes: int = 0
    summary: MigrationSummary | None = None
    told: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    stage: Stage, mode: str, scenario: str, contents: Sequence[Content], at_once: bool = False
) -> tuple[Run, dict[str, Any]]:
    """Migrate all guests to the other host; the run, and what else there is to know of it.

    :param contents: of the guests' memories; what is used is counted anew.
    :param at_once: all guests at the same time, and not in turn.
    """
    guests, shape = stage.guests, stage.shape
    contents = [
        dataclasses.replace(content, used=guest.used_bytes())
        for guest, content in zip(guests, contents, strict=True)
    ]
    _wait_for_backlog(stage)
    time.sleep(CALM)
    with network_series(stage.hosts.link) as network:
        begin = time.monotonic()
        with ThreadPoolExecutor(len(guests) if at_once else 1) as pool:
            given_up = [threading.Event() for _ in guests]
            try:
                outcomes = list(
                    pool.map(functools.partial(_migrate, stage, mode), guests, given_up)
                )
            except BaseException:
                # An interrupted measurement does not wait for what it has begun
                for event in given_up:
                    event.set()
                raise
    end = max(outcome.end for outcome in outcomes)
    before = [guest.load.tps(begin - CALM + 1, begin) for guest in guests]
    recovered = _wait_for_recovery(guests, outcomes, end, [0.9 * tps for tps in before])
    silences = [
        guest.probe.silence(max(begin, _switched(outcome) - AROUND), outcome.end + AROUND)
        for guest, outcome in zip(guests, outcomes, strict=True)
    ]
    worst = max(silences, key=lambda silence: silence.downtime)
    entries = [guest.ledger.check() for guest in guests]
    summaries = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    relayed = [each for each in summaries if each.mode == THROUGH_RELAYS]
    reasons = [each.fallback_reason for each in summaries if each.fallback_reason is not None]
    run: Run = {
        "scenario": scenario,
        "mode": mode,
        "database": shape.release.flavour,
        "network_mb_s": shape.network,
        "volume_mb_s": shape.volume,
        "pool_share": shape.pool,
        "completed": all(outcome.completed for outcome in outcomes),
        "fallback_reason": reasons[0] if reasons else None,
        "total_s": round(end - begin, 3),
        "ideal_s": round(Content.of(contents).ideal(shape), 3),
        "downtime_ms": round(worst.downtime * 1e3, 1),
        "guest_bytes": sum(outcome.guest_bytes for outcome in outcomes),
        "wire_bytes": int(network[-1][1]),
        "volume_bytes": sum(each.volume_bytes for each in relayed),
        "pages_referenced": sum(each.pages_referenced for each in relayed),
        "misses": sum(each.misses for each in relayed),
        "tps_before": round(sum(before), 2),
        "tps_during": round(sum(guest.load.tps(begin, end) for guest in guests), 2),
        "tps_after": round(sum(guest.load.tps(end, end + CALM) for guest in guests), 2),
        "recover_90_s": recovered,
        "lost_commits": sum(each.lost for each in entries),
        "series": {
            **load_series([guest.load for guest in guests], begin, end),
            "network": network,
            "downtime": [worst.begin - begin, worst.end - begin],
        },
    }
    if len(relayed) == 1:
        run["series"]["volume"] = run_of(relayed[0])["series"]["volume"]
    details = [
        _details(guest, outcome, content, begin)
        for guest, outcome, content in zip(guests, outcomes, contents, strict=True)
    ]
    return run, {"scenario": scenario, "mode": mode, "guests": details}


def _wait_for_backlog(stage: Stage) -> None:
    """What clients have asked for in an earlier outage is done first: until then the load is more
    than that of the other modes.
    """
    limit, end = 1.3 * stage.shape.rate, time.monotonic() + BACKLOG_PATIENCE
    if not limit or stage.shape.load not in SYSBENCH_LOADS:
        return
    while time.monotonic() < end:
        now = time.monotonic()
        if all(guest.load.tps(now - 6, now) <= limit for guest in stage.guests):
            return
        time.sleep(1)


def _migrate(stage: Stage, mode: str, guest: WorkingGuest, given_up: threading.Event) -> _Outcome:
    # Whoever orders a migration sets no limit to it; this one gives up as an operator would
    giving_up = threading.Timer(_patience(stage), given_up.set)
    giving_up.start()
    outcome = _Outcome(time.monotonic())
    try:
        if mode == DMIGRATE:
            _through_relays(stage, guest, outcome, given_up)
        else:
            _by_libvirt(guest, mode, outcome, given_up)
    finally:
        giving_up.cancel()
    outcome.end = time.monotonic()
    if outcome.summary is not None:
        # What follows puts the database's settings back; the guest has arrived by then
        outcome.end = min(outcome.end, outcome.begin + outcome.summary.total_s)
    return outcome


def _by_libvirt(
    guest: WorkingGuest, mode: str, outcome: _Outcome, given_up: threading.Event
) -> None:
    """Migrate as libvirt does without us."""
    parameters = {libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS: 2} if mode == MULTIFD else {}
    try:
        migration = guest.domain.begin_migration(flags=_FLAGS[mode], parameters=parameters)
        if mode == POST_COPY:
            migration.start_post_copy()
            outcome.switched = time.monotonic()
        while migration.running and not given_up.wait(0.02):
            pass
        if migration.running:
            migration.abort()
        outcome.told = migration.wait()  # it may have come to its end all the same
        outcome.completed = True
    except (libvirt.libvirtError, TimeoutError) as error:
        outcome.error = str(error)
    outcome.guest_bytes = outcome.told.get("memory_processed", 0)


def _through_relays(
    stage: Stage, guest: WorkingGuest, outcome: _Outcome, given_up: threading.Event
) -> None:
    """Migrate by nova-dmigrate."""
    domain = guest.domain
    source, destination = domain.host, stage.hosts.other(domain.host)
    try:
        outcome.summary = stage.services.migrate(
            *(domain.name, source, destination),
            cancelled=given_up,
            volume_bandwidth=int(stage.shape.volume * 1e6),
        )
    except exception.DMigrateError as error:
        outcome.error = f"{error}\n{stage.services.last_words()}"
        return
    outcome.completed = outcome.summary.state == COMPLETED
    outcome.error = outcome.summary.error
    outcome.guest_bytes = outcome.summary.guest_bytes
    outcome.told = dict(outcome.summary.libvirt)
    if outcome.completed:
        domain.arrived(destination)


def _patience(stage: Stage) -> float:
    """Seconds after which a migration will never end."""
    ram_bytes = sum(guest.domain.spec.ram_bytes for guest in stage.guests)
    return 120 + 4 * ram_bytes / (stage.shape.network * 1e6)


def _switched(outcome: _Outcome) -> float:
    """When the guest began to run at the destination, about."""
    return outcome.switched or outcome.end


def _wait_for_recovery(
    guests: Sequence[WorkingGuest],
    outcomes: Sequence[_Outcome],
    end: float,
    wanted: Sequence[float],
) -> float | None:
    """Seconds from the switchover until the throughput was back, of the guest for which it took
    longest; None if it did not come back. Sees to the calm at the end.
    """
    while True:
        found = [
            guest.load.recovered(_switched(outcome), tps)
            for guest, outcome, tps in zip(guests, outcomes, wanted, strict=True)
        ]
        seconds = [each for each in found if each is not None]
        now = time.monotonic()
        if now > end + RECOVERY_PATIENCE and len(seconds) < len(found):
            return None
        if now > end + CALM + 1 and len(seconds) == len(found):
            return round(max(seconds), 2)
        time.sleep(0.5)


@contextlib.contextmanager
def network_series(link: HostPair) -> Iterator[list[list[float]]]:
    """[seconds, bytes over the migration network in both directions], several times a second."""
    points: list[list[float]] = []
    ended = threading.Event()
    first, begin = sum(link.counters()), time.monotonic()

    def record() -> None:
        while True:
            last = ended.wait(0.25)
            sent = sum(link.counters()) - first
            points.append([time.monotonic() - begin, float(sent)])
            if last:
                return

    thread = threading.Thread(target=record, name="network", daemon=True)
    thread.start()
    try:
        yield points
    finally:
        ended.set()
        thread.join()


def load_series(loads: Sequence[Load], begin: float, end: float) -> dict[str, Any]:
    """Throughput of all loads together, and the worst latency, by the second."""
    seconds = np.arange(-CALM, end - begin + RECOVERY_PATIENCE)
    tps, latency = np.zeros(len(seconds)), np.zeros(len(seconds))
    until = len(seconds)
    for load in loads:
        reports = load.reports()
        times = reports[:, 0] - begin - 0.5
        tps += np.interp(seconds, times, reports[:, 1])
        latency = np.maximum(latency, np.interp(seconds, times, reports[:, 2]))
        until = min(until, int(np.searchsorted(seconds, times[-1])))
    shown = slice(0, until)
    return {
        "tps": np.column_stack([seconds, tps])[shown].tolist(),
        "latency_ms": np.column_stack([seconds, latency])[shown].tolist(),
    }


def _details(
    guest: WorkingGuest, outcome: _Outcome, content: Content, begin: float
) -> dict[str, Any]:
    longest = guest.probe.silence(outcome.begin, outcome.end)
    return {
        "guest": guest.domain.name,
        "begin_s": outcome.begin - begin,
        "end_s": outcome.end - begin,
        "error": outcome.error,
        "content": dataclasses.asdict(content),
        "longest_silence_ms": longest.downtime * 1e3,
        "longest_silence_s": [longest.begin - begin, longest.end - begin],
        "ordinary_answer_ms": longest.ordinary * 1e3,
        "phases": dict(outcome.summary.phases) if outcome.summary else {},
        "libvirt": outcome.told,
    }

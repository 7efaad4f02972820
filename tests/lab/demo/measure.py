# SPDX-License-Identifier: Apache-2.0
"""One migration of a guest at work, and what it has cost: a run of report.json."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import libvirt
import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.migration.summary import COMPLETED, MigrationSummary
from nova_dmigrate.migration.summary import DMIGRATE as THROUGH_RELAYS
from nova_dmigrate.report.history import run_of
from tests.lab.demo.stage import Content, Stage
from tests.lab.domains import FLAGS

Run = dict[str, Any]

PRE_COPY, AUTO_CONVERGE, POST_COPY = "pre-copy", "auto-converge", "post-copy"
MULTIFD, DMIGRATE = "multifd-zstd", "dmigrate"
MODES = (PRE_COPY, AUTO_CONVERGE, POST_COPY, MULTIFD, DMIGRATE)

#: Seconds before and after a migration in which the throughput is measured.
CALM = 12.0
#: Seconds after which the throughput is given up to come back.
RECOVERY_PATIENCE = 60.0
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
    """What whoever carried a migration out says of it. ``switched``: by time.monotonic()."""

    completed: bool = False
    switched: float | None = None
    error: str | None = None
    guest_bytes: int | None = None
    summary: MigrationSummary | None = None
    told: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(stage: Stage, mode: str, scenario: str, content: Content) -> tuple[Run, dict[str, Any]]:
    """Migrate the guest to the other host; the run, and what else there is to know of it.

    :param content: of the guest's memory; what is used is counted anew.
    """
    shape = stage.shape
    content = dataclasses.replace(content, used=stage.used_bytes())
    time.sleep(CALM)
    with _network_series(stage) as network:
        begin = time.monotonic()
        outcome = _through_relays(stage) if mode == DMIGRATE else _by_libvirt(stage, mode)
        end = time.monotonic()
    if outcome.summary is not None:
        # What follows puts the database's settings back; the guest has arrived by then
        end = min(end, begin + outcome.summary.total_s)
    tps_before = stage.load.tps(begin - CALM + 1, begin)
    recovered = _wait_for_recovery(stage, outcome.switched or end, end, 0.9 * tps_before)
    longest = stage.probe.silence(begin, end)
    silence = stage.probe.silence(max(begin, (outcome.switched or end) - AROUND), end + AROUND)
    entries = stage.ledger.check()
    summary = outcome.summary
    relayed = summary is not None and summary.mode == THROUGH_RELAYS
    run: Run = {
        "scenario": scenario,
        "mode": mode,
        "database": shape.release.flavour,
        "network_mb_s": shape.network,
        "volume_mb_s": shape.volume,
        "pool_share": shape.pool,
        "completed": outcome.completed,
        "fallback_reason": summary.fallback_reason if summary else None,
        "total_s": round(end - begin, 3),
        "ideal_s": round(content.ideal(shape), 3),
        "downtime_ms": round(silence.downtime * 1e3, 1),
        "guest_bytes": outcome.guest_bytes,
        "wire_bytes": int(network[-1][1]),
        "volume_bytes": summary.volume_bytes if summary and relayed else 0,
        "pages_referenced": summary.pages_referenced if summary and relayed else 0,
        "misses": summary.misses if summary and relayed else 0,
        "tps_before": round(tps_before, 2),
        "tps_during": round(stage.load.tps(begin, end), 2),
        "tps_after": round(stage.load.tps(end, end + CALM), 2),
        "recover_90_s": recovered,
        "lost_commits": entries.lost,
        "series": _series(stage, begin, end, network, summary),
    }
    run["series"]["downtime"] = [silence.begin - begin, silence.end - begin]
    details = {
        "mode": mode,
        "error": outcome.error,
        "content": dataclasses.asdict(content),
        "ledger": dataclasses.asdict(entries),
        "ordinary_answer_ms": silence.ordinary * 1e3,
        "longest_silence_ms": longest.downtime * 1e3,
        "longest_silence_s": [longest.begin - begin, longest.end - begin],
        "phases": dict(summary.phases) if summary else {},
        "libvirt": outcome.told,
    }
    return run, details


def _by_libvirt(stage: Stage, mode: str) -> _Outcome:
    """Migrate as libvirt does without us."""
    parameters = {libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS: 2} if mode == MULTIFD else {}
    outcome = _Outcome()
    migration = stage.domain.begin_migration(flags=_FLAGS[mode], parameters=parameters)
    try:
        if mode == POST_COPY:
            migration.start_post_copy()
            outcome.switched = time.monotonic()
        outcome.told = migration.wait(_patience(stage))
        outcome.completed = True
    except TimeoutError as error:
        outcome.error = str(error)
        with contextlib.suppress(libvirt.libvirtError):
            migration.abort()
        with contextlib.suppress(libvirt.libvirtError):
            migration.wait()
            outcome.completed = True
    except libvirt.libvirtError as error:
        outcome.error = str(error)
    outcome.guest_bytes = outcome.told.get("memory_processed")
    return outcome


def _through_relays(stage: Stage) -> _Outcome:
    """Migrate by nova-dmigrate."""
    source, domain = stage.domain.host, stage.domain
    destination = stage.hosts.other(source)
    rate = stage.shape.volume * 1e6
    # Whoever orders it has no time limit for it; this one gives up as an operator would
    giving_up = threading.Timer(_patience(stage), domain.on(source).abortJob)
    giving_up.start()
    try:
        summary = stage.services.migrate(
            domain.name, source, destination, volume_bandwidth=int(rate)
        )
    except exception.DMigrateError as error:
        return _Outcome(error=f"{error}\n{stage.services.last_words()}")
    finally:
        giving_up.cancel()
        giving_up.join()
    if summary.state == COMPLETED:
        domain.arrived(destination)
    return _Outcome(
        completed=summary.state == COMPLETED,
        error=summary.error,
        guest_bytes=summary.guest_bytes,
        summary=summary,
        told=dict(summary.libvirt),
    )


def _patience(stage: Stage) -> float:
    """Seconds after which a migration will never end."""
    return 120 + 6 * stage.domain.spec.ram_bytes / (stage.shape.network * 1e6)


def _wait_for_recovery(stage: Stage, switched: float, end: float, wanted: float) -> float | None:
    """Seconds from the switchover until the throughput was back. Sees to the calm at the end."""
    while True:
        recovered = stage.load.recovered(switched, wanted)
        now = time.monotonic()
        if now > end + CALM + 1 and (recovered is not None or now > end + RECOVERY_PATIENCE):
            return None if recovered is None else round(recovered, 2)
        time.sleep(0.5)


@contextlib.contextmanager
def _network_series(stage: Stage) -> Iterator[list[list[float]]]:
    """[seconds, bytes over the migration network in both directions], several times a second."""
    points: list[list[float]] = []
    ended = threading.Event()
    first, begin = sum(stage.hosts.link.counters()), time.monotonic()

    def record() -> None:
        while True:
            last = ended.wait(0.25)
            sent = sum(stage.hosts.link.counters()) - first
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


def _series(
    stage: Stage,
    begin: float,
    end: float,
    network: list[list[float]],
    summary: MigrationSummary | None,
) -> dict[str, Any]:
    reports = stage.load.reports()
    shown = reports[(reports[:, 0] > begin - CALM) & (reports[:, 0] < end + RECOVERY_PATIENCE)]
    times = shown[:, 0] - begin
    series: dict[str, Any] = {
        "network": network,
        "tps": np.column_stack([times - 0.5, shown[:, 1]]).tolist(),
        "latency_ms": np.column_stack([times - 0.5, shown[:, 2]]).tolist(),
    }
    if summary is not None:
        series["volume"] = run_of(summary)["series"]["volume"]
    return series

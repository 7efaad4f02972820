# SPDX-License-Identifier: Apache-2.0
"""Guests that are migrated in one mode after the other, there and back, and checked at the end."""

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate.report import Section, format_comparison, format_table, write_report
from nova_dmigrate.report.runs import fell_back
from tests.lab.demo.machine import machine
from tests.lab.demo.measure import Run, measure
from tests.lab.demo.stage import Content, Shape, Stage, WorkingGuest
from tests.lab.demo.tables import table_errors

_began = time.monotonic()
#: A report's runs with their series, from which it can be written again.
_KEPT = "runs.json"
#: What goes on besides, while guests migrate: entered for each migration.
Trouble = Callable[[Stage], contextlib.AbstractContextManager[None]]


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"[{time.monotonic() - _began:5.0f} s] {text}", file=sys.stderr, flush=True)


def no_trouble(stage: Stage) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """``guests`` migrate in turn, unless ``at_once``. ``name`` is the scenario of its runs.

    ``deadline``: seconds within which all of them should have left their host; None for no matter.
    """

    name: str
    shape: Shape
    modes: tuple[str, ...]
    guests: int = 1
    at_once: bool = False
    trouble: Trouble = no_trouble
    deadline: float | None = None


@dataclasses.dataclass
class Comparison:
    """``details``: more about each of the ``runs``. ``machine``: texts, numbers, truths by
    name.
    """

    runs: list[Run] = dataclasses.field(default_factory=list)
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every database is as it was left; not so if one was not looked at."""
        return all(run.get("check_ok") and not run["lost_commits"] for run in self.runs)

    @classmethod
    def read(cls, directory: Path) -> "Comparison":
        """What `write` has written there; an empty one if it has not."""
        try:
            return cls(**json.loads((directory / _KEPT).read_text()))
        except FileNotFoundError:
            return cls()

    def add(self, run: Run, more: dict[str, Any]) -> None:
        """Add a run and its details, in the place of an earlier one of the same kind."""
        kind = _kind(run)
        kept = [place for place, each in enumerate(self.runs) if _kind(each) != kind]
        self.runs[:] = [*(self.runs[place] for place in kept), run]
        self.details[:] = [*(self.details[place] for place in kept), more]

    def write(self, directory: Path, sections: Sequence[Section] = ()) -> None:
        """Print the table and what it says of DMigrate, and write the report.

        :param sections: what the report has to say besides.
        :raises ReportError: it cannot be written.
        """
        files = write_report(self.runs, self.machine, directory, sections=sections)
        (directory / "details.json").write_text(json.dumps(self.details, indent=2) + "\n")
        (directory / _KEPT).write_text(json.dumps(dataclasses.asdict(self)))
        print(format_table(self.runs), flush=True)
        for more in self.details:
            if "deadline_s" in more:
                print(f"{more['scenario']}, {more['mode']}: {_eviction(more)}", flush=True)
        said = format_comparison(self.runs)
        if said:
            print(f"\n{said}", flush=True)
        say(f"The report is {files.html}")


def compare(scenarios: Sequence[Scenario], directory: Path, result: Comparison) -> None:
    """Add the runs of scenarios, which the same guests play in turn.

    Whatever is raised, those that are finished by then are there. Their databases are looked at
    after an error as well; only an interrupt ends all at once.

    :param scenarios: their shapes differ in the volume's bandwidth alone.
    :param directory: an empty one, for the files of hosts and guests.
    """
    runs: list[Run] = []
    with Stage(scenarios[0].shape, directory, say, scenarios[0].guests) as stage:
        result.machine = machine(stage)
        try:
            for scenario in scenarios:
                stage.shape = scenario.shape
                for run in _play(scenario, stage, result):
                    runs.append(run)
        except Exception:
            if runs:
                _check_all(stage.guests, runs)
            raise
        _check_all(stage.guests, runs)


def _play(scenario: Scenario, stage: Stage, result: Comparison) -> Iterator[Run]:
    contents = [guest.content() for guest in stage.guests]
    all_of_it = Content.of(contents)
    used, mapped = all_of_it.used >> 20, all_of_it.mapped >> 20
    say(f"{scenario.name}, pool {scenario.shape.pool:.0%}, volume {scenario.shape.volume:g} MB/s")
    say(f"{used} MiB of RAM are used, of which {mapped} are on the volume as well")
    for mode in scenario.modes:
        say(f"Migrating to the other host by {mode}")
        with scenario.trouble(stage):
            run, more = measure(stage, mode, scenario.name, contents, scenario.at_once)
        if scenario.deadline is not None:
            more |= _emptied(run, scenario.deadline)
        result.add(run, more)
        say(_sentence(run, more))
        yield run


def _kind(run: Run) -> tuple[object, ...]:
    """What tells a run from others in a report."""
    names = ("scenario", "mode", "database", "network_mb_s", "volume_mb_s", "pool_share")
    return tuple(run.get(name) for name in names)


def _emptied(run: Run, deadline: float) -> dict[str, Any]:
    """Whether the host was empty in time, for the details of a run."""
    empty = run["total_s"] if run["completed"] else None
    return {
        "deadline_s": round(deadline, 1),
        "empty_s": empty,
        "in_time": empty is not None and empty <= deadline,
    }


def _eviction(more: Mapping[str, Any]) -> str:
    """The same, in words."""
    if more["empty_s"] is None:
        return f"the host was not empty after {more['deadline_s']:.0f} s, nor later"
    verdict = "in time" if more["in_time"] else "too late"
    return (
        f"the host was empty after {more['empty_s']:.1f} s, {verdict}:"
        f" {more['deadline_s']:.0f} s were allowed"
    )


def _check_all(guests: Sequence[WorkingGuest], runs: Sequence[Run]) -> None:
    """Note in the runs whether all databases are sound; None if that cannot be known."""
    say("Checking the database")
    found = [_check(guest) for guest in guests]
    for run in runs:
        run["check_ok"] = None if None in found and False not in found else all(found)


def _check(guest: WorkingGuest) -> bool | None:
    try:
        guest.stop_clients()
        entries, wrong = guest.ledger.check(), table_errors(guest.guest)
    except Exception:  # noqa: BLE001 - the other guests' databases can be looked at all the same
        say(f"A database cannot be looked at: {traceback.format_exc()}")
        return None
    for line in wrong:
        say(f"CHECK TABLE: {line}")
    say(
        f"{entries.acknowledged} commits were acknowledged to the ledger's client:"
        f" {entries.lost} are lost, {entries.wrong} rows are wrong; {len(wrong)} tables have errors"
    )
    return entries.ok and not wrong


def _sentence(run: Run, more: dict[str, Any]) -> str:
    eviction = f"; {_eviction(more)}" if "deadline_s" in more else ""
    if not run["completed"]:
        errors = "; ".join(str(guest["error"]) for guest in more["guests"] if guest["error"])
        return f"Not completed after {run['total_s']:.1f} s: {errors}{eviction}"
    how = " ".join(filter(None, (f"Completed in {run['total_s']:.1f} s", fell_back(run))))
    return f"{how}; {run['downtime_ms']:.0f} ms without an answer{eviction}"

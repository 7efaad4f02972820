# SPDX-License-Identifier: Apache-2.0
"""A live database VM moves between two hosts: by pre-copy, by post-copy, by DMigrate.

Chosen by environment variables: NETWORK and VOLUME in MB/s, POOL (share of the guest's RAM), LOAD
(one of sysbench's), DB (mysql, mariadb), RAM (MiB). Writes demo-report/.

Exit status: 0 all migrations completed and the database is whole, 1 not so, 2 wrong settings.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nova_dmigrate.report import format_table, write_report
from tests.lab import database_image
from tests.lab.demo.machine import machine
from tests.lab.demo.measure import DMIGRATE, POST_COPY, PRE_COPY, Run, measure
from tests.lab.demo.settings import WrongSetting, available_release, shape_from
from tests.lab.demo.stage import Content, Shape, Stage
from tests.lab.processes import workspace

REPORT = Path("demo-report")
MODES = (PRE_COPY, POST_COPY, DMIGRATE)

_began = time.monotonic()


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"[{time.monotonic() - _began:5.0f} s] {text}", file=sys.stderr, flush=True)


def demo(shape: Shape, directory: Path) -> tuple[list[Run], list[dict[str, Any]], dict[str, Any]]:
    """Migrate in each mode; the runs, more about each, and about the machine."""
    runs, details = [], []
    with Stage(shape, directory, say) as stage:
        content = Content(stage.used_bytes(), stage.mapped_bytes())
        say(f"{content.used >> 20} MiB of RAM are used; {content.mapped >> 20} are on the volume")
        for mode in MODES:
            say(f"Migrating to the other host by {mode}")
            run, more = measure(stage, mode, shape.load, content)
            runs.append(run)
            details.append(more)
            say(_sentence(run, more))
        say("Checking the database")
        stage.stop_clients()
        entries, wrong = stage.ledger.check(), stage.check_tables()
        for line in wrong:
            say(f"CHECK TABLE: {line}")
        say(
            f"{entries.acknowledged} commits were acknowledged to the ledger's client:"
            f" {entries.lost} are lost, {entries.wrong} rows are wrong; {len(wrong)} tables have"
            " errors"
        )
        for run in runs:
            run["check_ok"] = entries.ok and not wrong
        return runs, details, machine(stage)


def _sentence(run: Run, more: dict[str, Any]) -> str:
    if not run["completed"]:
        return f"Not completed after {run['total_s']:.1f} s: {more['error']}"
    why = f", as an ordinary one: {run['fallback_reason']}" if run["fallback_reason"] else ""
    return (
        f"Completed in {run['total_s']:.1f} s{why}; {run['downtime_ms']:.0f} ms without an answer"
    )


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    reason = database_image.unavailable()
    if reason is not None:
        print(f"The demo cannot run here: {reason}", file=sys.stderr)
        return 2
    try:
        shape = shape_from(os.environ)
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    try:
        shape = dataclasses.replace(shape, release=available_release(shape.release, say))
        with workspace() as directory:
            runs, details, found = demo(shape, directory)
    except KeyboardInterrupt:
        say("Interrupted; all of it has been removed")
        return 1
    files = write_report(runs, found, REPORT)
    with contextlib.suppress(OSError):
        (REPORT / "details.json").write_text(json.dumps(details, indent=2, default=str) + "\n")
    print(format_table(runs))
    say(f"The report is {files.html}")
    whole = all(run["completed"] and run["check_ok"] and not run["lost_commits"] for run in runs)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())

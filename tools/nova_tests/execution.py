# SPDX-License-Identifier: Apache-2.0
"""Workers: one process for each driver that a job compares."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tools.count_results import outcomes
from tools.nova_tests import process
from tools.nova_tests.comparison import MISSING
from tools.nova_tests.plan import EVENTLET, THREADING, Job
from tools.nova_tests.worker import NEVER_MADE, TEST_TIMEOUT

ROOT = Path(__file__).resolve().parent.parent.parent
# What Nova goes by when it decides for a backend
DISABLE_EVENTLET = {THREADING: "1", EVENTLET: "0"}
# Lines of a worker's output that are shown if it did not end well
TAIL = 20


@dataclass(frozen=True)
class Run:
    """What became of a worker.

    :ivar statuses: of its tests; MISSING is that of a test that did not run, since the process
        ended before.
    :ivar trouble: what there is to say of the process; empty if it ended well.
    """

    statuses: dict[str, str]
    trouble: str = ""


@dataclass(frozen=True)
class Worker:
    """Runs the tests of a job with a driver.

    :ivar shim: directory that has the driver's package ``dmigrate``.
    :ivar results: directory for results and output.
    """

    job: Job
    driver: str
    shim: Path
    results: Path
    limits: process.Limits = field(default_factory=process.Limits)

    def run(self, only: Iterable[str] = ()) -> Run:
        """Run all tests, or ``only`` those.

        :raises RuntimeError: no test ran, or made the driver, so they prove nothing.
        """
        name = f"{self.job.name}-{self.driver}{'-again' if only else ''}"
        # Results of an earlier run must never stand for this one's
        files = {
            kind: self.results / f"{name}.{kind}" for kind in ("subunit", "names", "verdict", "log")
        }
        for path in files.values():
            path.write_bytes(b"")
        argv = [str(ROOT / f".make/nova-{self.job.release}/bin/python")]
        argv += ["-m", "tools.nova_tests.worker", "--driver", self.driver]
        argv += ["--shim", str(self.shim), "--select", self.job.group.select]
        argv += ["--output", str(files["subunit"]), "--names", str(files["names"])]
        argv += ["--verdict", str(files["verdict"])]
        if only:
            chosen = self.results / f"{name}.only"
            chosen.write_text("".join(f"{test}\n" for test in only))
            argv += ["--only", str(chosen)]
        argv += self.job.group.modules
        began = time.monotonic()
        ending = process.run(
            argv, self._environment(), ROOT, files["log"], files["verdict"], self.limits
        )
        found = outcomes(files["subunit"])
        statuses = {test: found.get(test, MISSING) for test in files["names"].read_text().split()}
        print(f"{name}: {len(statuses)} tests, {time.monotonic() - began:.0f} s", flush=True)
        if ending.verdict == NEVER_MADE:
            raise RuntimeError(f"{name}: no test made the driver")
        trouble = told(ending, files["log"])
        if not statuses:
            raise RuntimeError(f"{name}: no test ran; {trouble}\n{_tail(files['log'])}")
        if trouble:
            trouble = f"{name}: {trouble}"
            print(trouble, flush=True)
            if ending.verdict is None:
                print(_tail(files["log"]), flush=True)
        return Run(statuses, trouble)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OS_NOVA_DISABLE_EVENTLET_PATCHING": DISABLE_EVENTLET[self.job.backend],
            "OS_TEST_TIMEOUT": str(TEST_TIMEOUT),
            "OS_STDOUT_CAPTURE": "1",
            "OS_STDERR_CAPTURE": "1",
        }


def told(ending: process.Ending, log: Path) -> str:
    """Return what there is to say of how a worker's process has ended; nothing if it ended well.

    :param log: its output.
    """
    if ending.killed_after is None:
        return "" if ending.verdict is not None else f"the process ended early, see {log}"
    if ending.verdict is None:
        return (
            f"the process had to be killed after {ending.killed_after:g} s, and tests are without"
            f" a result; its threads: {log}"
        )
    return (
        f"all tests had ended, but {ending.killed_after:g} s later their process had not and had to"
        f" be killed; the results are complete; its threads: {log}"
    )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])

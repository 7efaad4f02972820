# SPDX-License-Identifier: Apache-2.0
"""Workers: one process for each driver that a job compares."""

import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tools.count_results import outcomes
from tools.nova_tests.comparison import MISSING
from tools.nova_tests.plan import EVENTLET, THREADING, Job
from tools.nova_tests.worker import NEVER_MADE, TEST_TIMEOUT

ROOT = Path(__file__).resolve().parent.parent.parent
# Seconds; the last resort, for a process
RUN_TIMEOUT = 1800
# What Nova goes by when it decides for a backend
DISABLE_EVENTLET = {THREADING: "1", EVENTLET: "0"}
# Lines of a worker's output that are shown if it did not end well
TAIL = 20


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

    def run(self, only: Iterable[str] = ()) -> dict[str, str]:
        """Run all tests, or ``only`` those; return the status of each.

        That of a test that did not run, since the process ended before, is MISSING.

        :raises RuntimeError: no test made the driver, so they prove nothing.
        """
        name = f"{self.job.name}-{self.driver}{'-again' if only else ''}"
        # Results of an earlier run must never stand for this one's
        files = {kind: self.results / f"{name}.{kind}" for kind in ("subunit", "names", "log")}
        for path in files.values():
            path.write_bytes(b"")
        argv = [str(ROOT / f".make/nova-{self.job.release}/bin/python")]
        argv += ["-m", "tools.nova_tests.worker", "--driver", self.driver]
        argv += ["--shim", str(self.shim), "--select", self.job.group.select]
        argv += ["--output", str(files["subunit"]), "--names", str(files["names"])]
        if only:
            chosen = self.results / f"{name}.only"
            chosen.write_text("".join(f"{test}\n" for test in only))
            argv += ["--only", str(chosen)]
        began = time.monotonic()
        self._start([*argv, *self.job.group.modules], files["log"])
        found = outcomes(files["subunit"])
        statuses = {test: found.get(test, MISSING) for test in files["names"].read_text().split()}
        print(f"{name}: {len(statuses)} tests, {time.monotonic() - began:.0f} s", flush=True)
        return statuses

    def _start(self, argv: list[str], log: Path) -> None:
        environment = {
            **os.environ,
            "OS_NOVA_DISABLE_EVENTLET_PATCHING": DISABLE_EVENTLET[self.job.backend],
            "OS_TEST_TIMEOUT": str(TEST_TIMEOUT),
            "OS_STDOUT_CAPTURE": "1",
            "OS_STDERR_CAPTURE": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        try:
            with log.open("wb") as stream:
                subprocess.run(
                    argv,
                    check=True,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=RUN_TIMEOUT,
                )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            lines = log.read_text(errors="replace").splitlines()
            if getattr(error, "returncode", None) == NEVER_MADE:
                raise RuntimeError(f"{log.stem}: no test made the driver") from error
            print("\n".join([f"{log.stem}: {error}", *lines[-TAIL:]]), flush=True)

# SPDX-License-Identifier: Apache-2.0
"""Run Nova's own tests with the stock driver and with DMigrate's in its place, and compare.

With --short only what moves servers, on the backend that is the release's default; and with the
stock driver only what does not pass with ours.

Prints, for each release of Nova and each of its backends, how many tests ended with ours as with
the stock driver, and names those that did not. Exits 1 if one did not. Raw results and the output
of each process are in .make/nova-tests; .make/nova.subunit has a result for each comparison.

Nova's functional tests wait some seconds for what their threads do, and now and then one fails on
a busy machine, whatever the driver. What does not pass with both drivers runs a second time with
both, which is told; then the second result counts. A process that does not end is killed, which is
told, too; results that it has written count.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from tools.nova_tests.comparison import MISSING, Comparison, write
from tools.nova_tests.execution import ROOT, Run, Worker
from tools.nova_tests.plan import RELEASES, UNSUPPORTED, Job, jobs_of
from tools.nova_tests.worker import OURS, STOCK

SHORT_HELP = "only tests that move servers, and with the stock driver only what fails with ours"
STATE = Path(os.environ.get("NDM_STATE") or ROOT / ".make")
RESULTS = STATE / "nova-tests"


def main(argv: list[str]) -> int:
    """Return the exit status.

    :raises CalledProcessError: the environment of a release cannot be made.
    """
    parser = argparse.ArgumentParser(prog="tools.nova_tests", description=__doc__)
    parser.add_argument("--short", action="store_true", help=SHORT_HELP)
    parser.add_argument("--shim", type=Path, default=ROOT / "nova/virt", help=argparse.SUPPRESS)
    parser.add_argument("releases", nargs="*", type=int, default=sorted(RELEASES, reverse=True))
    arguments = parser.parse_args(argv)

    RESULTS.mkdir(parents=True, exist_ok=True)
    for release in arguments.releases:
        subprocess.run([str(ROOT / "tools/nova_tests/venv.sh"), str(release)], check=True)
    jobs = jobs_of(arguments.releases, arguments.short)
    with ThreadPoolExecutor(int(os.environ.get("CONCURRENCY") or os.cpu_count() or 1)) as pool:
        compared, troubles = compare(pool, jobs, arguments.shim, not arguments.short)
    for title, comparison in compared.items():
        print("\n".join(comparison.lines(title)))
    for (release, backend), names in UNSUPPORTED.items():
        if any((job.release, job.backend) == (release, backend) for job in jobs):
            for name, why in names.items():
                print(f"not run, Nova {release} itself does not pass them: {backend} {name}: {why}")
    for trouble in troubles:
        print(f"TROUBLE: {trouble}")
    with (STATE / "nova.subunit").open("wb") as stream:
        write(compared, stream)
    good = all(each.good for each in compared.values())
    if arguments.short and os.environ.get("CI", "").lower() in ("1", "true"):
        # There nothing may be missing, and Nova skips none of these where it has all that it needs
        good = good and not any(each.skipped for each in compared.values())
    return 0 if good else 1


def compare(
    pool: Executor, jobs: list[Job], shim: Path, whole: bool
) -> tuple[dict[str, Comparison], list[str]]:
    """Return the comparison of each release and backend, by its title, and what there is to say of
    processes that did not end well.

    :param whole: whether all tests run with both drivers; with the stock driver only those do that
        do not pass with ours if not.
    """
    pairs = [tuple(Worker(job, driver, shim, RESULTS) for driver in (STOCK, OURS)) for job in jobs]
    workers = [worker for pair in pairs for worker in pair if whole or worker.driver == OURS]
    runs = run(pool, {worker: [] for worker in workers})
    found: dict[Worker, dict[str, str]] = {worker: {} for pair in pairs for worker in pair}
    found |= {worker: each.statuses for worker, each in runs.items()}
    again = {}
    for pair in pairs:
        comparison = Comparison(whole)
        comparison.add(*(found[worker] for worker in pair))
        for name in comparison.unsettled:
            statuses = ", ".join(found[worker].get(name, MISSING) for worker in pair)
            print(f"Runs again: {pair[0].job.title}: {name}: {statuses}", flush=True)
        if comparison.unsettled:
            again |= dict.fromkeys(pair, comparison.unsettled)
    runs_again = run(pool, again)
    for worker, each in runs_again.items():
        found[worker] |= {name: each.statuses.get(name, MISSING) for name in again[worker]}

    compared: dict[str, Comparison] = {}
    for pair in pairs:
        comparison = compared.setdefault(pair[0].job.title, Comparison(whole))
        comparison.add(*(found[worker] for worker in pair))
    troubles = [each.trouble for each in (*runs.values(), *runs_again.values()) if each.trouble]
    return compared, troubles


def run(pool: Executor, work: dict[Worker, list[str]]) -> dict[Worker, Run]:
    """Return what became of each worker, with all of its tests or with those that are named."""
    return dict(zip(work, pool.map(Worker.run, work.keys(), work.values()), strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

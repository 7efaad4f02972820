#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run what depends on QEMU and libvirt with those of newer releases of Debian.

tools/compat.py SUITE,... makes their trees (see tests/lab/hypervisors.py), runs the parts of the
suites named below with each, and prints a table. Raw results are in .make/compat-SUITE. Exits
non-zero if a test failed, a suite did not run to its end, or no test ran.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.count_results import count  # noqa: E402

# Streams as they are, migrations through relays, faults; domains of libvirt; whole migrations
PARTS = {
    "integration": r"test_(corpus_live|streams|bit_exact)"
    r"|Test(Killed|Ended|Unsupported|Domains)|GuestTest",
    "guests": r"test_orchestration|TestPartition",
}
VERSIONS = (
    "from tests.lab import hypervisors as h; print(h.emulator().version, h.libvirt_version())"
)
ROW = "{:<10} {:<10} {:<10} {:>8} {:>8} {:>8} {:>8}"


def main(suites: list[str]) -> int:
    """Run everything, print the table; return the exit status."""
    rows, status = [], 0
    for suite in suites:
        began = time.monotonic()
        state = ROOT / ".make" / f"compat-{suite}"
        environment = {**os.environ, "LAB_SUITE": suite, "NDM_STATE": str(state)}
        versions = _versions(environment)
        print(f"\n=== {suite}: QEMU {versions[0]}, libvirt {versions[1]}", flush=True)
        results = []
        for part, tests in PARTS.items():
            results.append(state / f"{part}.subunit")
            # A count of an earlier run must never stand for this one
            results[-1].unlink(missing_ok=True)
            argv = [str(ROOT / "tools/run_suite.sh"), part, tests]
            status |= subprocess.run(argv, env=environment, check=False).returncode != 0
        counted = count(results)
        status |= not counted.good
        rows.append((suite, *versions, counted, round(time.monotonic() - began)))
    print("\n" + ROW.format("suite", "QEMU", "libvirt", "passed", "failed", "skipped", "seconds"))
    for suite, qemu, libvirt, counted, seconds in rows:
        numbers = (counted.passed, len(counted.failed), counted.skipped, seconds)
        print(ROW.format(suite, qemu, libvirt, *numbers))
    for suite, *_, counted, _ in rows:
        for line in counted.failed:
            print(f"{suite}: {line}")
    return int(status)


def _versions(environment: dict[str, str]) -> tuple[str, str]:
    argv = [sys.executable, "-c", VERSIONS]
    output = subprocess.run(
        argv, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    qemu, libvirt = output.split()
    return qemu, libvirt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].split(",")))

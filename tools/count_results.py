# SPDX-License-Identifier: Apache-2.0
"""Add up the tests in files of subunit v2 results and print one line with the count.

A test that began and never ended (its process was killed) counts as failed, and so does one that
was expected to fail and passed. Exits non-zero if any test failed, or if none ran at all.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import subunit
import testtools

PASSED = {"success", "xfail"}
SKIPPED = {"skip"}
NO_OUTCOME = {"exists"}


@dataclass(frozen=True)
class Count:
    """``failed``: a line for each test that failed, its last status and its name."""

    passed: int
    skipped: int
    failed: list[str]

    @property
    def good(self) -> bool:
        return bool(self.passed) and not self.failed


def outcomes(path: Path) -> dict[str, str]:
    """Return each test's name and its last status: "inprogress" if it never ended."""
    found: dict[str, str] = {}

    def note(test: dict[str, object]) -> None:
        status = str(test["status"])
        # Some packets carry only output of a worker, and name no test
        if test["id"] and status not in NO_OUTCOME:
            found[str(test["id"])] = status

    result = testtools.StreamToDict(note)
    result.startTestRun()
    with path.open("rb") as stream:
        subunit.ByteStreamToStreamResult(stream, non_subunit_name="stdout").run(result)
    result.stopTestRun()
    found.pop("stdout", None)
    return found


def count(paths: list[Path]) -> Count:
    """Add up the results in files; one that is not there has none."""
    results = {
        f"{path}:{name}": status
        for path in paths
        if path.exists()
        for name, status in outcomes(path).items()
    }
    return Count(
        passed=sum(status in PASSED for status in results.values()),
        skipped=sum(status in SKIPPED for status in results.values()),
        failed=[
            f"{status.upper()}: {name.partition(':')[2]}"
            for name, status in results.items()
            if status not in PASSED | SKIPPED
        ],
    )


def main(paths: list[str]) -> int:
    """Print the names of the failed tests, then the count; return the exit status."""
    counted = count([Path(path) for path in paths])
    for line in counted.failed:
        print(line)
    print(f"{counted.passed} passed, {len(counted.failed)} failed, {counted.skipped} skipped")
    return 0 if counted.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""Add up the tests in files of subunit v2 results and print one line with the count.

A test that began and never ended (its process was killed) counts as failed, and so does one that
was expected to fail and passed. Exits non-zero if any test failed, or if none ran at all.
"""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import subunit
import testtools

PASSED = {"success", "xfail"}
SKIPPED = {"skip"}
NO_OUTCOME = {"exists"}
#: Characters of a failure's reason that are shown.
_LONGEST = 600


@dataclass(frozen=True)
class Count:
    """``failed``: a line for each test that failed, its last status, its name, and why."""

    passed: int
    skipped: int
    failed: list[str]

    @property
    def good(self) -> bool:
        return bool(self.passed) and not self.failed


@dataclass(frozen=True)
class Result:
    """A test's last status, "inprogress" if it never ended, and the error that it ended with."""

    status: str
    reason: str = ""


def results(path: Path) -> dict[str, Result]:
    """Return each test's name and its result."""
    found: dict[str, Result] = {}

    def note(test: Mapping[str, Any]) -> None:
        status = str(test["status"])
        # Some packets carry only output of a worker, and name no test
        if test["id"] and status not in NO_OUTCOME:
            content = test["details"].get("traceback")
            found[str(test["id"])] = Result(status, _reason(content.as_text()) if content else "")

    result = testtools.StreamToDict(note)
    result.startTestRun()
    with path.open("rb") as stream:
        subunit.ByteStreamToStreamResult(stream, non_subunit_name="stdout").run(result)
    result.stopTestRun()
    found.pop("stdout", None)
    return found


def _reason(traceback: str) -> str:
    """The exception at a traceback's end, in one line."""
    _, found, last_call = traceback.rpartition('\n  File "')
    lines = last_call.splitlines()[1 if found else 0 :]
    said = itertools.dropwhile(lambda line: found and line.startswith("    "), lines)
    return " ".join(" ".join(said).split())[:_LONGEST]


def outcomes(path: Path) -> dict[str, str]:
    """Return each test's name and its last status: "inprogress" if it never ended."""
    return {name: result.status for name, result in results(path).items()}


def count(paths: list[Path]) -> Count:
    """Add up the results in files; one that is not there has none."""
    found = [
        (name, each) for path in paths if path.exists() for name, each in results(path).items()
    ]
    return Count(
        passed=sum(result.status in PASSED for _, result in found),
        skipped=sum(result.status in SKIPPED for _, result in found),
        failed=[
            f"{result.status.upper()}: {name}{f': {result.reason}' if result.reason else ''}"
            for name, result in found
            if result.status not in PASSED | SKIPPED
        ],
    )


def main(paths: list[str]) -> int:
    """Print the failed tests and why they failed, then the count; return the exit status."""
    counted = count([Path(path) for path in paths])
    for line in counted.failed:
        print(line)
    print(f"{counted.passed} passed, {len(counted.failed)} failed, {counted.skipped} skipped")
    return 0 if counted.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""Add up the tests in files of subunit v2 results and print one line with the count.

A test that began and never ended (its process was killed) counts as failed, and so does one that
was expected to fail and passed. Exits non-zero if any test failed, or if none ran at all.
"""

import sys
from pathlib import Path

import subunit
import testtools

PASSED = {"success", "xfail"}
SKIPPED = {"skip"}
NO_OUTCOME = {"exists"}


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


def main(paths: list[str]) -> int:
    """Print the names of the failed tests, then the count; return the exit status."""
    results = {
        f"{path}:{name}": status
        for path in map(Path, paths)
        if path.exists()
        for name, status in outcomes(path).items()
    }
    passed = sum(status in PASSED for status in results.values())
    skipped = sum(status in SKIPPED for status in results.values())
    failed = [name for name, status in results.items() if status not in PASSED | SKIPPED]
    for name in failed:
        print(f"{results[name].upper()}: {name.partition(':')[2]}")
    print(f"{passed} passed, {len(failed)} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

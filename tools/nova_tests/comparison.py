# SPDX-License-Identifier: Apache-2.0
"""What became of tests with the stock driver and with DMigrate's, test by test."""

from dataclasses import dataclass, field
from typing import BinaryIO

import subunit

MISSING = "missing"
PASSED = frozenset({"success", "xfail"})
SKIPPED = "skip"
FINE = PASSED | {SKIPPED}


@dataclass
class Comparison:
    """Tests by name. Statuses are subunit's; MISSING is that of a test that did not run.

    :ivar whole: whether all ran with both drivers; with the stock driver only those did that do not
        pass with ours if not.
    :ivar same: status of each test that ended with ours as with the stock driver, or as it shall.
    :ivar different: (with the stock driver, with ours) of each other test.
    """

    whole: bool = True
    same: dict[str, str] = field(default_factory=dict)
    different: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def skipped(self) -> list[str]:
        """The tests that are skipped with both drivers."""
        return [name for name, status in self.same.items() if status == SKIPPED]

    @property
    def failed(self) -> list[str]:
        """The tests that fail with both drivers, which proves nothing."""
        return [name for name, status in self.same.items() if status not in FINE]

    @property
    def unsettled(self) -> list[str]:
        """The tests that a second run may find to be as stock."""
        return [*self.different, *self.failed]

    @property
    def good(self) -> bool:
        """Whether tests ran, and all ended as stock, and none fails with the stock driver."""
        return bool(self.same) and not self.unsettled

    def add(self, stock: dict[str, str], ours: dict[str, str]) -> None:
        """Compare the outcomes of a run with those of another."""
        for name in sorted(stock.keys() | ours.keys()):
            status = ours.get(name, MISSING)
            unasked = status if status in PASSED and not self.whole else MISSING
            statuses = stock.get(name, unasked), status
            if statuses[0] == statuses[1]:
                self.same[name] = statuses[0]
            else:
                self.different[name] = statuses

    def lines(self, title: str) -> list[str]:
        """Return the names of tests that differ, fail or are skipped, then the count."""
        found = [
            f"DIFFERS: {title}: {name}: {stock} with the stock driver, {ours} with DMigrate's"
            for name, (stock, ours) in self.different.items()
        ]
        found += [f"FAILS WITH BOTH: {title}: {name}" for name in self.failed]
        found += [f"skipped with both: {title}: {name}" for name in self.skipped]
        fine = "as stock" if self.whole else "pass or are as stock"
        count = f"{title}: {len(self.same)} of {len(self.same) + len(self.different)} {fine}"
        passed = len(self.same) - len(self.skipped) - len(self.failed)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        found.append(f"{count} ({passed} passed{failed}, {len(self.skipped)} skipped with both)")
        return found


def write(compared: dict[str, Comparison], stream: BinaryIO) -> None:
    """Write a result for each test that was compared: what it passed is the comparison."""
    output = subunit.StreamResultToBytes(stream)
    for title, comparison in compared.items():
        prefix = title.replace(" ", "-")
        for name, status in comparison.same.items():
            output.status(test_id=f"{prefix}.{name}", test_status=status)
        for name in comparison.different:
            output.status(test_id=f"{prefix}.{name}", test_status="fail")

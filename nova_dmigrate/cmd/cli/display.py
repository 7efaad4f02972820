# SPDX-License-Identifier: Apache-2.0
"""Results as cliff shows them: for people in a table, for programs as they are."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cliff.columns import FormattableColumn
from cliff.display import DisplayCommandBase
from cliff.lister import Lister
from cliff.show import ShowOne

from nova_dmigrate.cmd.cli.base import CommandLine, UsageError
from nova_dmigrate.findings import Finding
from nova_dmigrate.migration.summary import MigrationSummary

_MIB = 1 << 20


class Bytes(FormattableColumn[int]):
    """A number of bytes."""

    def human_readable(self) -> str:
        """In MiB."""
        return f"{self._value / _MIB:.1f} MiB"


class Number(FormattableColumn[float | None]):
    """A measured number, which may not be known."""

    def human_readable(self) -> str:
        """With one digit after the point."""
        return "" if self._value is None else f"{self._value:.1f}"


class Text(FormattableColumn[str | None]):
    """A text, which there may not be."""

    def human_readable(self) -> str:
        """Empty for none."""
        return self._value or ""


class Phases(FormattableColumn[dict[str, float]]):
    """Seconds by phase."""

    def human_readable(self) -> str:
        """A phase on each line."""
        return "\n".join(f"{name}: {seconds:.1f} s" for name, seconds in self._value.items())


class Findings(FormattableColumn[list[dict[str, str]]]):
    """What was found."""

    def human_readable(self) -> str:
        """A finding on each line."""
        return "\n".join(
            f"{each['severity']}: {each['message']} [{each['code']}]" for each in self._value
        )


if TYPE_CHECKING:
    _WithColumns = DisplayCommandBase[Any]
else:
    _WithColumns = DisplayCommandBase  # up to cliff 4.12, which Nova 32 has, it is of no type


class Checked(_WithColumns):
    """Mixed in before a command with columns: unknown ones are wrong usage before it does anything.

    :cvar COLUMNS: all columns that it can have.
    :ivar status: the exit status when all went well so far.
    """

    COLUMNS: Sequence[str]
    app: CommandLine
    status = 0

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Run the command; returns the exit status."""
        try:
            self._generate_columns_and_selector(parsed_args, self.COLUMNS)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return super().run(parsed_args) or self.status


_SUMMARY_TYPES: dict[str, type[FormattableColumn[Any]]] = {
    **dict.fromkeys(("guest_bytes", "wire_bytes", "saved_bytes", "volume_bytes"), Bytes),
    **dict.fromkeys(("total_s", "downtime_ms", "mapping_s"), Number),
    **dict.fromkeys(("fallback_reason", "fallback_message", "error"), Text),
    "phases": Phases,
    "findings": Findings,
}
#: Of a summary in full. Its series are for reports, libvirt's own statistics for the file.
SUMMARY_COLUMNS = (
    *("id", "domain", "instance", "source", "destination", "state", "error", "mode"),
    *("fallback_reason", "fallback_message", "started", "total_s", "downtime_ms"),
    *("guest_bytes", "wire_bytes", "saved_bytes", "volume_bytes", "pages_referenced", "misses"),
    *("mapped_pages", "mapping_s", "phases", "findings"),
)
#: Of summaries in a list.
HISTORY_COLUMNS = (
    *("id", "domain", "source", "destination", "state", "mode", "fallback_reason"),
    *("total_s", "downtime_ms", "wire_bytes", "volume_bytes"),
)
FINDING_COLUMNS = ("severity", "code", "message")


def cells(summary: MigrationSummary, columns: Sequence[str]) -> list[Any]:
    """The cells of a summary."""
    record = summary.to_dict()
    return [_SUMMARY_TYPES.get(name, lambda value: value)(record[name]) for name in columns]


def finding_cells(found: Finding) -> tuple[str, str, str]:
    """The cells of a finding."""
    return found.severity.value, found.code, found.message


class CheckedShowOne(Checked, ShowOne):
    """One object."""


class CheckedLister(Checked, Lister):
    """Several objects."""

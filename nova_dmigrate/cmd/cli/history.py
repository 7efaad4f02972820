# SPDX-License-Identifier: Apache-2.0
"""The commands that look at the migrations that have been."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliff.command import Command

from nova_dmigrate.cmd.cli.base import CommandLine
from nova_dmigrate.cmd.cli.display import (
    HISTORY_COLUMNS,
    SUMMARY_COLUMNS,
    CheckedLister,
    CheckedShowOne,
    cells,
)
from nova_dmigrate.migration.history import history_of
from nova_dmigrate.report.history import write_history_report


class History(CheckedLister):
    """List the migrations that were started from this host, the newest first."""

    COLUMNS = HISTORY_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--limit",
            type=_count,
            default=20,
            metavar="NUMBER",
            help="at most so many (default: %(default)s)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        """The newest summaries."""
        summaries = history_of(self.app.configuration()).list(parsed_args.limit)
        return HISTORY_COLUMNS, [cells(each, HISTORY_COLUMNS) for each in summaries]


class Show(CheckedShowOne):
    """Show one migration that has been."""

    COLUMNS = SUMMARY_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("id", metavar="ID", help="as in the history")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        """The summary."""
        summary = history_of(self.app.configuration()).get(parsed_args.id)
        return SUMMARY_COLUMNS, cells(summary, SUMMARY_COLUMNS)


class Report(Command):
    """Write a report of migrations that have been: one HTML file with plots.

    Several migrations are compared with each other. Needs matplotlib, the extra "report".
    """

    app: CommandLine

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("ids", metavar="ID", nargs="+", help="as in the history")
        parser.add_argument(
            "--output",
            type=Path,
            metavar="FILE.html",
            help="the file, which is overwritten (default: ID.html of the first ID)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Write it, and tell where."""
        past = history_of(self.app.configuration())
        summaries = [past.get(each) for each in parsed_args.ids]
        path = parsed_args.output or Path(f"{parsed_args.ids[0]}.html")
        write_history_report(summaries, path)
        print(path, file=self.app.stdout)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number

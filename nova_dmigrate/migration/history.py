# SPDX-License-Identifier: Apache-2.0
"""The migrations that have been: one file each, in a directory.

Several processes may add at the same time, and read meanwhile: a file is there as a whole or not at
all. A file that makes no sense costs a warning, never the others.
"""

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration.summary import MigrationSummary, is_id
from nova_dmigrate.retention import Retention

LOG = logging.getLogger(__name__)

#: Some ten times what the longest series of two relays take.
_MAX_FILE = 256 << 20
#: What a writer that was killed has left is not another one's that is just writing.
_PARTIAL = Retention(days=1)


class History:
    """The summaries in ``directory``, which is made when the first one comes.

    :param kept: how many, and for how long; the others go when one is added.
    """

    def __init__(self, directory: Path, kept: Retention | None = None) -> None:
        self._directory = directory
        self._kept = kept or Retention()

    def add(self, summary: MigrationSummary) -> Path:
        """Keep a summary; returns its file.

        :raises HistoryError: it cannot be written, or there is one with that id.
        """
        path = self._path(summary.id)
        partial = path.with_name(f".{summary.id}.{secrets.token_hex(4)}.partial")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("x", encoding="utf-8") as file:
                    json.dump(summary.to_dict(), file, allow_nan=False)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                # Unlike a rename, a link never takes the place of another summary
                os.link(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            self._sync_directory()
        except FileExistsError as error:
            raise _error(f"{self._directory} already has a migration {summary.id}") from error
        except (OSError, TypeError, ValueError) as error:
            raise _error(f"{path} cannot be written: {error}") from error
        self._kept.prune(map(self._path, self.ids()), newest=path)
        _PARTIAL.prune(self._directory.glob(".*.partial"))
        return path

    def list(self, limit: int | None = None) -> tuple[MigrationSummary, ...]:
        """The newest summaries, newest first.

        :param limit: at most so many; None for all.
        :raises HistoryError: the directory cannot be read; that it does not exist is no error.
        """
        found: list[MigrationSummary] = []
        for identifier in self.ids():
            if limit is not None and len(found) >= limit:
                break
            try:
                found.append(self.get(identifier))
            except exception.HistoryError as error:
                LOG.warning("A migration is left out of the history: %s", error)
        return tuple(found)

    def get(self, identifier: str) -> MigrationSummary:
        """The summary with that id.

        :raises HistoryError: there is none, or its file makes no sense.
        """
        if not is_id(identifier):
            raise _error(f"{identifier!r} is no id of a migration (as 20261125-170301-abcdef)")
        path = self._path(identifier)
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE + 1)
        except FileNotFoundError as error:
            raise _error(f"{self._directory} has no migration {identifier}") from error
        except OSError as error:
            raise _error(f"{path} cannot be read: {error}") from error
        if len(content) > _MAX_FILE:
            raise _error(f"{path} is larger than {_MAX_FILE >> 20} MiB")
        try:
            summary = MigrationSummary.from_dict(json.loads(content))
        except (ValueError, RecursionError, exception.SummaryError) as error:
            raise _error(f"{path} is broken: {error}") from error
        if summary.id != identifier:
            raise _error(f"{path} is broken: it is of migration {summary.id}")
        return summary

    def ids(self) -> tuple[str, ...]:
        """The ids of all summaries, newest first, unread.

        :raises HistoryError: the directory cannot be read; that it does not exist is no error.
        """
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _error(f"{self._directory} cannot be read: {error}") from error
        identifiers = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return tuple(sorted(filter(is_id, identifiers), reverse=True))

    def _path(self, identifier: str) -> Path:
        return self._directory / f"{identifier}.json"

    def _sync_directory(self) -> None:
        # Not every file system can; the summary is there all the same unless the host crashes now
        with contextlib.suppress(OSError):
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def history_of(config: cfg.ConfigOpts) -> History:
    """The history of the host that has this configuration."""
    options = config.migration
    kept = Retention(count=options.history_count, days=options.history_days)
    return History(Path(options.history_directory), kept)


def keep(summary: MigrationSummary, config: cfg.ConfigOpts) -> None:
    """Note a migration that has ended. That it cannot be noted is in the log: it has ended all the
    same."""
    try:
        history_of(config).add(summary)
    except (OSError, exception.DMigrateError) as error:
        LOG.error("The migration is not in the history: %s", error)


def _error(reason: str) -> exception.HistoryError:
    return exception.HistoryError(reason=reason)

# SPDX-License-Identifier: Apache-2.0
"""What the agent has changed in which server, on disk before it is done.

An agent that was killed finds here what it has to restore. The file is replaced as a whole, and
is on the disk (fsync of file and directory) before the first statement that it speaks of. There
are two copies of it: without it nobody knows what the settings of a server were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from nova_dmigrate.rpc import fields
from nova_dmigrate.rpc.fields import (
    checked,
    integer,
    number,
    optional,
    record,
    several,
    text,
    token,
)

LOG = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 1
_MAX_BYTES = 1 << 18
_TIME = number(0, 1e10)
_VALUE = text(512)


@dataclasses.dataclass(frozen=True)
class Identity:
    """One run of one server: process and its start, or where that is not seen, when it began.

    ``start_time``: clock ticks since boot. ``began``: seconds since boot, roughly.
    """

    pid: int | None = checked(optional(integer(1, 1 << 32)), default=None)
    start_time: int | None = checked(optional(integer(0, 1 << 62)), default=None)
    began: float | None = checked(optional(number(-1e10, 1e10)), default=None)


@dataclasses.dataclass(frozen=True)
class Change:
    """``ours`` is the value that we have set, as the server shows it."""

    name: str = checked(token())
    original: str = checked(_VALUE)
    ours: str = checked(_VALUE)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was changed in one server, in the order in which it was set.

    ``applied``: all of it was, so that ``ours`` is exact; before that any value may be ours.
    """

    socket: str = checked(text(512))
    identity: Identity = checked(record(Identity))
    applied: bool = checked(fields.boolean)
    changes: tuple[Change, ...] = checked(several(record(Change), 32))


@dataclasses.dataclass(frozen=True)
class Ledger:
    """All changes of one preparation.

    ``deadline``: end of the lease; ``ends``: the latest that it can be renewed to;
    ``flush_until``: end of the time for flushing; all in seconds of CLOCK_BOOTTIME, which only
    means something during the boot ``boot_id``.
    """

    format: int = checked(integer(_FORMAT, _FORMAT))
    boot_id: str = checked(token())
    lease_id: str = checked(token())
    deadline: float = checked(_TIME)
    ends: float = checked(_TIME)
    flush_until: float = checked(_TIME)
    dirty_share: float = checked(number(0, 1))
    entries: tuple[Entry, ...] = checked(several(record(Entry), 64))


def make(**values: Any) -> Ledger:
    return Ledger(format=_FORMAT, **values)


class LedgerFile:
    """The file that holds the ledger, if there is one, and its copy beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._copies = (path, path.with_suffix(".copy"))

    def load(self) -> Ledger | None:
        """What was left by an agent that has ended.

        What cannot be read is put aside if no copy can, see `lost`.
        """
        unreadable = []
        for path in self._copies:
            try:
                return read_record(Ledger, path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                LOG.error("%s cannot be understood: %s", path, error)
                unreadable.append(path)
        for path in unreadable:
            aside = self._free_name()
            path.rename(aside)
            LOG.error("%s is now %s", path, aside)
        return None

    def lost(self) -> list[Path]:
        """Ledgers that were put aside, until somebody removes them."""
        return sorted(self._path.parent.glob(f"{self._path.stem}.unreadable-*"))

    def save(self, ledger: Ledger) -> None:
        """Replace the file. When this returns, it survives a crash of the guest."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._copies:
            write_record(path, ledger)
            self._sync_directory()

    def remove(self) -> None:
        # The copy first: what is left by a crash in between is the newest
        for path in reversed(self._copies):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                self._sync_directory()

    def _free_name(self) -> Path:
        names = (self._path.with_suffix(f".unreadable-{number}") for number in itertools.count(1))
        return next(name for name in names if not os.path.lexists(name))

    def _sync_directory(self) -> None:
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_record(cls: type[T], path: Path) -> T:
    """A record that `write_record` has written.

    :raises OSError: if there is none that can be read.
    :raises ValueError: if it is none of these (RecursionError, too).
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError("it is too long")
    return fields.parse(cls, json.loads(content))


def write_record(path: Path, values: Any) -> None:
    """Replace a file as a whole; on disk is the old one or the new one.

    :raises OSError: if it cannot be written; the old one is as it was.
    """
    fresh = path.with_suffix(path.suffix + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(fields.to_dict(values), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)

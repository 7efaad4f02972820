# SPDX-License-Identifier: Apache-2.0
"""One relay as a process that outlives who has started it.

It has a session of its own in the operating system, tells its events to a file and everything
else on its control socket, so that whoever knows its files and who it is (`Identity`) can take it
over.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_dmigrate.relay.monitor import ask

Report = dict[str, Any]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_EVENTS = 64 << 10
_MAX_SUMMARY = 64 << 20
#: Bytes that a pipe takes before anybody reads.
_PIPE = 64 << 10
#: Sockets that the relay makes are for QEMU's group as well.
_UMASK = 0o007


@dataclass(frozen=True)
class Identity:
    """A process, whatever becomes of its number: with its start, in this life of the machine."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        """Who has that number now; None if nobody has."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            boot = _BOOT_ID.read_text().strip()
        except OSError:
            return None
        return cls(pid, f"{boot}/{stat.rpartition(')')[2].split()[19]}")


@dataclass(frozen=True)
class RelayFiles:
    """Where a relay tells of itself."""

    events: Path
    control: Path
    summary: Path

    def remove(self) -> None:
        """Remove all but the summary."""
        for path in (self.events, self.control):
            path.unlink(missing_ok=True)


class RelayProcess:
    """A running relay. May be used by several threads."""

    def __init__(
        self, descriptor: int, files: RelayFiles, child: "subprocess.Popen[bytes] | None"
    ) -> None:
        self._descriptor = descriptor
        # Not earlier: the number would become another's, which some thread would take for this one
        weakref.finalize(self, os.close, descriptor)
        self._files = files
        self._child = child

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        description: Report,
        files: RelayFiles,
        note: Callable[[Identity], None],
    ) -> "RelayProcess":
        """Start a relay.

        :param note: called with who it is, before it knows what to do: if this process ends
            before that was noted, the relay ends as well.
        :raises OSError: it cannot be started, or not be noted.
        """
        files.summary.unlink(missing_ok=True)
        text = json.dumps(description).encode()
        with open(files.events, "wb") as events:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=events,
                cwd="/",
                start_new_session=True,
                umask=_UMASK,
                # Room for all of it: a relay that does not read must not hold up the service
                pipesize=len(text) if len(text) > _PIPE else -1,
            )
        assert child.stdin is not None
        descriptor = os.pidfd_open(child.pid)
        try:
            with child.stdin:
                identity = Identity.of(child.pid)
                if identity is None:
                    raise ProcessLookupError(f"process {child.pid} is gone")
                note(identity)
                child.stdin.write(text)
        except BrokenPipeError:
            pass  # one that has ended already: its events tell why
        except BaseException:
            child.kill()
            child.wait()
            os.close(descriptor)
            raise
        return cls(descriptor, files, child)

    @classmethod
    def adopt(cls, identity: Identity, files: RelayFiles) -> "RelayProcess | None":
        """A relay that somebody else has started; None if it has ended."""
        try:
            descriptor = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if Identity.of(identity.pid) != identity:
            os.close(descriptor)
            return None
        return cls(descriptor, files, None)

    def alive(self) -> bool:
        """Whether it still runs."""
        return not self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether that has come."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def ask(self, command: str, timeout: float, **values: float | str) -> Report | None:
        """Its answer to a command; None if it has none within ``timeout`` seconds."""
        try:
            answer = ask(self._files.control, command, timeout, **values)
        except (OSError, ValueError):
            return None
        return None if "error" in answer else answer

    def bury(self) -> None:
        """After its end: leave no zombie."""
        if self._child is not None:
            self._child.wait()


def read_events(path: Path) -> list[Report]:
    """What a relay has told so far. A line that is not complete yet is left out."""
    try:
        data = _read(path)
    except OSError:
        return []
    return _parse(data)


def has_told_kept(path: Path) -> bool:
    """Whether a relay has told that only QEMU may end it, which it does before it is so. What
    cannot be read counts as told.
    """
    try:
        data = _read(path)
    except FileNotFoundError:
        return False  # went with the relay's end
    except OSError:
        return True
    return any(event.get("event") == "kept" for event in _parse(data))


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MAX_EVENTS)


def _parse(data: bytes) -> list[Report]:
    events = []
    for line in data.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return events


def read_summary(path: Path) -> Report | None:
    """The summary of a relay that has ended, without its time series; None if there is none."""
    try:
        if path.stat().st_size > _MAX_SUMMARY:
            return None
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict):
        return None
    summary.pop("series", None)
    return summary

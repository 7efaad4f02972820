# SPDX-License-Identifier: Apache-2.0
"""A process that ends in time, whatever its threads wait for.

Nova's threads wait for each other's answers up to half an hour, and at its end Python waits for
all of them. So a process may stay when all that is wanted of it is there, and this may not cost the
results of all others.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds; the last resort
RUN_TIMEOUT = 1800
# Seconds for a process to end by itself when all results are there
EXIT_TIMEOUT = 60
# Seconds for it to write the stacks of all threads
STACKS_TIMEOUT = 10
_POLL = 0.2


@dataclass(frozen=True)
class Limits:
    """Seconds; see above."""

    run: float = RUN_TIMEOUT
    exit: float = EXIT_TIMEOUT


@dataclass(frozen=True)
class Ending:
    """How a process has ended.

    :ivar verdict: what it has written when it was done; None if it was never done.
    :ivar killed_after: seconds that it had been waited for in vain; None if it ended by itself.
    """

    verdict: int | None
    killed_after: float | None


def run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    directory: Path,
    log: Path,
    verdict: Path,
    limits: Limits,
) -> Ending:
    """Run a process to its end, or to the end of its time.

    One that is killed writes the stacks of its threads to its log before, if it is Python.

    :param log: takes what it prints.
    :param verdict: takes a number once it has done all, and only has to end; is empty before.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            argv,
            cwd=directory,
            env={**environment, "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            killed_after = _wait(process, verdict, limits)
        finally:
            _end(process)
    said = verdict.read_text()
    return Ending(int(said) if said else None, killed_after)


def _wait(process: "subprocess.Popen[bytes]", verdict: Path, limits: Limits) -> float | None:
    """Return the limit that it has exceeded; None if it has ended."""
    limit, since = limits.run, time.monotonic()
    done = False
    while time.monotonic() < since + limit:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
            return None
        if not done and verdict.stat().st_size:
            done, limit, since = True, limits.exit, time.monotonic()
    return limit


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it, if it is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STACKS_TIMEOUT)
    process.kill()
    process.wait()

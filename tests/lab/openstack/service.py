# SPDX-License-Identifier: Apache-2.0
"""The cloud's processes. Each has a log file, from which errors quote."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.lab.hosts import Host
from tests.lab.openstack.venv import environment
from tests.lab.processes import end, spawn

#: Seconds that a service may take to start, and a command to end, on a machine that is busy.
PATIENCE = 600.0
_STOP_PATIENCE = 20.0
_WORDS = 3000


class ServiceError(Exception):
    """A service did not start, or a command failed; the message holds what it last said."""


class Services:
    """Processes by name, with a log ``NAME.log`` each. ``close`` ends them, all at once."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(exist_ok=True)
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        argv: Sequence[str],
        host: Host | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start a service.

        :param host: where; on this machine if None.
        :param variables: more of the environment.
        """
        with open(self.log(name), "ab") as log:
            self._processes[name] = spawn(
                argv if host is None else host.argv(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(**(variables or {})),
                # Its workers end with it, whatever it does about them
                start_new_session=True,
            )

    def run(
        self, name: str, argv: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> str:
        """Run a command to its end; what it has printed, which is in its log as well.

        :raises ServiceError: it failed.
        """
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(**(variables or {})),
            timeout=PATIENCE,
            check=False,
        )
        with open(self.log(name), "ab") as log:
            log.write(done.stdout)
        if done.returncode:
            raise ServiceError(f"{' '.join(argv[:4])} failed:\n{self.last_words(name)}")
        return done.stdout.decode(errors="replace")

    def stop(self, name: str) -> None:
        """End a service, and what it has started."""
        self._end(name, [(signal.SIGTERM, _STOP_PATIENCE)])

    def kill(self, name: str) -> None:
        """The same by SIGKILL, as when its host dies."""
        self._end(name, [])

    def runs(self, name: str) -> bool:
        """Whether a service has been started and has not ended."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def close(self) -> None:
        """End all services."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for name in list(self._processes):
            self.stop(name)

    def pid(self, name: str) -> int:
        """The process of a service."""
        return self._processes[name].pid

    def log(self, name: str) -> Path:
        """Where a service, or a command, says what it does."""
        return self._logs / f"{name}.log"

    def last_words(self, name: str) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return self.log(name).read_bytes()[-_WORDS:].decode(errors="replace")
        return ""

    def wait_for_port(self, name: str, port: int) -> None:
        """Wait until a service listens at 127.0.0.1.

        :raises ServiceError: it has ended, or does not listen in time.
        """

        def listens() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return True
            return False

        self.wait(name, listens, f"listen at {port}")

    def wait(self, name: str, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition is met that a service shall meet.

        :param what: the service does then, for the error.
        :raises ServiceError: it has ended, or does not do so in time.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.check_alive(name)
            if time.monotonic() > deadline:
                raise ServiceError(f"{name} does not {what}:\n{self.last_words(name)}")
            time.sleep(0.2)

    def check_all_alive(self) -> None:
        """:raises ServiceError: a service has ended."""
        for name in self._processes:
            self.check_alive(name)

    def obituaries(self) -> str:
        """What services that have ended have said last, for error messages."""
        return "\n".join(
            f"{name} has ended:\n{self.last_words(name)}"
            for name, process in self._processes.items()
            if process.poll() is not None
        )

    def check_alive(self, name: str) -> None:
        """:raises ServiceError: a service has ended."""
        status = self._processes[name].poll()
        if status is not None:
            raise ServiceError(f"{name} has ended with {status}:\n{self.last_words(name)}")

    def _end(self, name: str, signals: Sequence[tuple[int, float]]) -> None:
        process = self._processes.pop(name)
        end(process, signals)
        _end_session(process.pid)


def _end_session(leader: int) -> None:
    """Kill what is left of a session whose leader has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)

# SPDX-License-Identifier: Apache-2.0
"""What the lab starts or makes is registered here and ends even when the test process is killed.

A reaper, one small process for each test process, reads the register from a pipe. When the pipe
closes, for whatever reason, it kills the processes, removes the namespaces with all that runs in
them and deletes the directories that are still registered. A parent-death signal would not do: the
kernel sends it when the starting *thread* ends.
"""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def start_time(pid: int) -> str | None:
    """Start of a process in clock ticks (with the pid it identifies it), None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


class _Register:
    """The writing end: what exists now, by kind and name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._reaper: subprocess.Popen[bytes] | None = None

    def _send(self, line: str) -> None:
        with self._lock:
            if self._reaper is None or self._owner != os.getpid():
                if self._reaper is None:
                    atexit.register(self._finish)
                self._owner = os.getpid()
                self._reaper = subprocess.Popen(
                    [sys.executable, "-I", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            stdin = self._reaper.stdin
            assert stdin is not None
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def _finish(self) -> None:
        if self._reaper is not None and self._owner == os.getpid():
            self._reaper.communicate()

    def add(self, kind: str, name: object) -> None:
        self._send(f"+{kind} {name}")

    def remove(self, kind: str, name: object) -> None:
        self._send(f"-{kind} {name}")


register = _Register()


def spawn(argv: Sequence[str | os.PathLike[str]], **options: Any) -> "subprocess.Popen[Any]":
    """Start a registered process (options as of subprocess.Popen). End it with `end`."""
    process = subprocess.Popen([os.fspath(a) for a in argv], **options)
    register.add("pid", f"{process.pid}:{start_time(process.pid)}")
    return process


def end(process: "subprocess.Popen[Any]", signals: Sequence[tuple[int, float]] = ()) -> int:
    """End a process: each (signal, patience in seconds) in turn, SIGKILL at last; its status."""
    started = start_time(process.pid)
    for number, patience in signals:
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
    if process.poll() is None:
        process.kill()
    status = process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    register.remove("pid", f"{process.pid}:{started}")
    return status


def terminate(process: "subprocess.Popen[Any]", patience: float = 10) -> int:
    """End a well-behaved process with SIGTERM, SIGKILL if it does not listen."""
    return end(process, [(signal.SIGTERM, patience)])


def inmates(namespace: str) -> dict[int, list[str]]:
    """The processes in a network namespace and their command lines, by process number."""
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    found = {}
    for pid in map(int, listed.stdout.split()):
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            found[pid] = arguments.split("\0")[:-1]
    return found


def end_inmates(namespace: str, patience: float = 30) -> None:
    """Kill all processes in a network namespace, also those that they start meanwhile."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        pids = inmates(namespace)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@contextlib.contextmanager
def workspace(parent: Path | None = None) -> Iterator[Path]:
    """A directory with a short path (UNIX sockets allow 107 bytes), deleted at the end."""
    path = make_workspace(parent)
    try:
        yield path
    finally:
        drop_workspace(path)


def make_workspace(parent: Path | None = None) -> Path:
    path = Path(tempfile.mkdtemp(prefix="ndm-", dir=parent))
    register.add("dir", path)
    return path


def drop_workspace(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    register.remove("dir", path)


def _reap(lines: Iterator[str]) -> None:
    """The reaper's life: follow the register to its end, then end what is left."""
    left: dict[tuple[str, str], None] = {}
    for line in lines:
        kind, _, name = line.rstrip("\n").partition(" ")
        if kind.startswith("+"):
            left[kind[1:], name] = None
        else:
            left.pop((kind[1:], name), None)
    order = {"pid": 0, "netns": 1, "dir": 2}
    for kind, name in sorted(left, key=lambda entry: order[entry[0]]):
        if kind == "pid":
            pid, _, started = name.partition(":")
            if start_time(int(pid)) == started:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
        elif kind == "netns":
            end_inmates(name)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        else:
            shutil.rmtree(name, ignore_errors=True)


if __name__ == "__main__":
    _reap(iter(sys.stdin))

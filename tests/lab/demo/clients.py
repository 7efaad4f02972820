# SPDX-License-Identifier: Apache-2.0
"""Programs that are clients of a database server, each a process of its own in their namespace."""

import argparse
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pymysql

from tests.lab.hosts import Host
from tests.lab.processes import end, spawn

ROOT = Path(__file__).parents[3]
#: Seconds without an answer after which a client takes its connection for dead.
ANSWER_PATIENCE = 120
_END_PATIENCE = 15.0


class ClientError(Exception):
    """A client did not do its work; the message holds what it last said."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where a server is, and who asks it: by TCP, or by a UNIX socket if ``socket`` is not empty.

    ``clients``: the namespace of its clients; this process's own if None.
    """

    host: str = ""
    socket: str = ""
    user: str = "load"
    password: str = "load"
    clients: Host | None = None

    def start(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a registered process among the clients."""
        return spawn(self._argv(argv), cwd=ROOT, stdin=subprocess.DEVNULL, **options)

    def start_module(self, module: str, *arguments: object, **options: Any) -> Any:
        """Start a program of this package, which begins with `parse`."""
        return self.start(self.module(module, *arguments), **options)

    def ask_module(self, module: str, *arguments: object, timeout: float = 600) -> Any:
        """Run one to its end; the JSON that it prints.

        :raises ClientError: it failed.
        """
        done = subprocess.run(
            self._argv(self.module(module, *arguments)),
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=timeout,
        )  # fmt: skip
        if done.returncode:
            raise ClientError(f"{module} failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def connect(self) -> "pymysql.Connection[Any]":
        """A connection to it from this process; every statement is a transaction.

        :raises pymysql.err.Error: there is none.
        """
        return pymysql.connect(
            host=self.host or None,
            unix_socket=self.socket or None,
            user=self.user,
            password=self.password,
            autocommit=True,
            connect_timeout=10,
            read_timeout=ANSWER_PATIENCE,
            write_timeout=ANSWER_PATIENCE,
        )

    def module(self, module: str, *arguments: object) -> list[str]:
        server = [f"--{name}={getattr(self, name)}" for name in _OPTIONS]
        return [sys.executable, "-m", module, *server, *map(str, arguments)]

    def _argv(self, argv: Sequence[str]) -> list[str]:
        return list(argv) if self.clients is None else self.clients.argv(argv)


AnyClient = TypeVar("AnyClient", bound="Client")
_OPTIONS = ("host", "socket", "user", "password")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What all these programs are told in the same way."""
    made = argparse.ArgumentParser(description=description)
    for name in _OPTIONS:
        made.add_argument(f"--{name}", default="")
    return made


def server_of(arguments: argparse.Namespace) -> Server:
    """The server that a program was told of."""
    return Server(**{name: getattr(arguments, name) for name in _OPTIONS})


def until_asked_to_end() -> threading.Event:
    """Is set by SIGTERM and SIGINT."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    return asked


class Client:
    """A program of this package at work. A context manager."""

    def __init__(self, process: "subprocess.Popen[Any]", log: Path) -> None:
        self._process = process
        self._log = log

    def __enter__(self: AnyClient) -> AnyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let it finish what it does, and wait until it has."""
        end(self._process, [(signal.SIGTERM, _END_PATIENCE)])

    def check_alive(self) -> None:
        """:raises ClientError: it has ended by itself."""
        if self._process.poll() is not None:
            raise ClientError(f"a client has ended: {self.last_words()}")

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_bytes()[-2000:].decode(errors="replace")
        return ""

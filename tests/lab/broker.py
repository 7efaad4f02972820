# SPDX-License-Identifier: Apache-2.0
"""A private RabbitMQ: own node, own epmd, own ports and directories, all gone at the end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nova_dmigrate.rpc import isolation
from tests.lab import processes

_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
HOST_USER = "nova-dmigrate"
_PATIENCE = 120.0


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Broker:
    """RabbitMQ with the virtual hosts and users of some instances, and that of host services.

    Every user's password is its name. `start` again after `kill` finds what was durable.
    """

    def __init__(self, instances: Iterable[str]) -> None:
        self._directory = processes.make_workspace()
        self.port, self._dist_port, self._epmd_port = free_ports(3)
        self._epmd: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        self._emulators: set[str] = set()
        self._write_configuration(list(instances))

    def url(self, instance: str, user: str | None = None, password: str | None = None) -> str:
        """Transport URL of an instance's virtual host, for its guest if no user is named."""
        user = user or isolation.guest_user(instance)
        vhost = isolation.virtual_host(instance)
        return f"rabbit://{user}:{password or user}@127.0.0.1:{self.port}/{vhost}"

    def host_url(self, instance: str) -> str:
        return self.url(instance, HOST_USER)

    def services_url(self) -> str:
        """Transport URL of the host services' virtual host."""
        return f"rabbit://{HOST_USER}:{HOST_USER}@127.0.0.1:{self.port}/{isolation.SERVICES}"

    def start(self) -> None:
        if self._epmd is None:
            self._epmd = processes.spawn(
                ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._wait_for_port(self._epmd_port)
        with (self._directory / "console").open("ab") as console:
            self._node = processes.spawn(
                [_SCRIPTS / "rabbitmq-server"],
                env=self._environment(),
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._wait_for_port(self.port)

    def kill(self) -> None:
        """SIGKILL for the node: the emulator and the script that has started it."""
        assert self._node is not None
        self._register_emulator()
        for pid in self.emulators:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for entry in self._emulators:
            processes.register.remove("pid", entry)
        # The script waits for its child and ends with it, so that no zombie is left
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._node.wait(10)
        processes.end(self._node)
        self._emulators.clear()
        self._node = None

    def control(self, *arguments: str) -> str:
        """rabbitmqctl: takes a second or two."""
        done = subprocess.run(
            [_SCRIPTS / "rabbitmqctl", "--longnames=false", "-q", *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {arguments}: {done.stdout}{done.stderr}")
        return done.stdout

    def close(self) -> None:
        if self._node is not None:
            self.kill()
        if self._epmd is not None:
            processes.end(self._epmd)
        processes.drop_workspace(self._directory)

    def __enter__(self) -> "Broker":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def emulators(self) -> tuple[int, ...]:
        """The processes that are the node."""
        return tuple(int(entry.partition(":")[0]) for entry in self._emulators)

    def log(self) -> str:
        return (self._directory / "console").read_text(errors="replace")

    def _register_emulator(self) -> None:
        """The script's child outlives the script: it has to be known to the reaper as well."""
        if self._node is None:
            return
        pid = self._node.pid
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                entry = f"{child}:{processes.start_time(int(child))}"
                if entry not in self._emulators:
                    processes.register.add("pid", entry)
                    self._emulators.add(entry)

    def _environment(self) -> dict[str, str]:
        here = self._directory
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(here),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "lab@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_BASE": str(here),
            "RABBITMQ_MNESIA_BASE": str(here / "data"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_PID_FILE": str(here / "pid"),
            "RABBITMQ_CONF_ENV_FILE": str(here / "environment"),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(here / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "generated"),
            # One scheduler, no busy waiting: other tests want the cores too
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none"
            " +sbwtdio none -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _write_configuration(self, instances: list[str]) -> None:
        definitions: dict[str, list[dict[str, Any]]] = {"users": [_user(HOST_USER)]}
        parts = [isolation.service_definitions(HOST_USER)]
        for instance in instances:
            definitions["users"].append(_user(isolation.guest_user(instance)))
            parts.append(isolation.definitions(instance, HOST_USER))
        for part in parts:
            for kind, entries in part.items():
                definitions.setdefault(kind, []).extend(entries)
        (self._directory / "definitions.json").write_text(json.dumps(definitions))
        (self._directory / "environment").touch()
        (self._directory / "plugins").write_text("[].\n")
        (self._directory / "rabbitmq.conf").write_text(
            f"load_definitions = {self._directory}/definitions.json\n"
            "loopback_users = none\n"
            "log.console = true\nlog.console.level = info\nlog.file = false\n"
            "disk_free_limit.absolute = 50MB\n"
        )

    def _wait_for_port(self, port: int) -> None:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            self._register_emulator()
            for process in (self._epmd, self._node):
                if process is not None and process.poll() is not None:
                    raise RuntimeError(f"the broker ended: {self.log()[-2000:]}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"the broker does not listen: {self.log()[-2000:]}")


def _user(name: str) -> dict[str, Any]:
    return {"name": name, "password": name, "tags": []}

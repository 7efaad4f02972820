# SPDX-License-Identifier: Apache-2.0
"""A node of a devstack that has nothing of devstack but stubs, in a directory of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent

Call = tuple[str, ...]

STACK = ("pre-install", "install", "post-config", "extra", "test-config")
#: What runs where in a devstack of one node, and of a further one of compute, as Zuul has it.
ALL_IN_ONE = "rabbit,mysql,key,g-api,placement-api,n-api,n-cond,n-sch,n-cpu,c-api,c-vol,tempest"
COMPUTE = "n-cpu,q-ovn-metadata-agent,c-vol,c-bak"

_SCRIPT = """
set -o errexit
source "$STUBS"
source "$PLUGIN/settings"
for phase in "$@"; do
    source "$PLUGIN/plugin.sh" $phase
done
"""


class Node:
    """A node: `run` phases on it, look at `calls` and at its files.

    :ivar directory: all that the plugin writes is below it.
    :ivar calls: of the run before, in their order.
    :ivar variables: of local.conf and devstack; may be changed.
    """

    def __init__(self, directory: Path, services: str) -> None:
        self.directory = directory
        self.calls: list[Call] = []
        for each in ("etc/nova", "etc/cinder", "apparmor", "exports.d", "nova/nova/virt", "broker"):
            (directory / each).mkdir(parents=True)
        for each in ("cloud", "bin"):
            (directory / each).mkdir()
        self.variables = {
            "ENABLED_SERVICES": services,
            "DISABLED_SERVICES": "",
            "DEVSTACK_PLUGINS": "nova-dmigrate",
            "DISTRO": "noble",
            "VIRT_DRIVER": "libvirt",
            "HOST_IP": "192.0.2.11",
            "SERVICE_HOST": "192.0.2.10",
            "RABBIT_HOST": "192.0.2.10",
            "RABBIT_PASSWORD": "secretrabbit",
            "ENABLE_DEBUG_LOG_LEVEL": "True",
            "STACK_USER": str(os.geteuid()),
            "PYTHON_PREFIX": str(Path(sys.executable).parent),
            "DATA_DIR": self.path("data"),
            "NOVA_DIR": self.path("nova"),
            "NOVA_STATE_PATH": self.path("data/nova"),
            "NOVA_CONF": self.path("etc/nova/nova.conf"),
            "CINDER_CONF": self.path("etc/cinder/cinder.conf"),
            "TEMPEST_CONFIG": self.path("etc/tempest.conf"),
            "INT_CA_DIR": self.path("data/CA/int-ca"),
            "NOVA_DMIGRATE_CONF_DIR": self.path("etc/nova-dmigrate"),
            "NOVA_DMIGRATE_SOCKET_DIR": self.path("run"),
            "NOVA_DMIGRATE_APPARMOR": self.path("apparmor/libvirt-qemu"),
            "NOVA_DMIGRATE_NFS_EXPORTS": self.path("exports.d/nova-dmigrate.exports"),
        }

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def stack(self) -> list[Call]:
        """All phases of stack.sh."""
        return self.run(*(f"stack {phase}" for phase in STACK))

    def run(self, *phases: str) -> list[Call]:
        """Run phases as devstack does; returns what was called.

        :raises AssertionError: one has failed; its output is the message.
        """
        done = self.attempt(*phases)
        if done.returncode:
            raise AssertionError(f"{phases}: {done.stdout}{done.stderr}")
        return self.calls

    def attempt(self, *phases: str) -> "subprocess.CompletedProcess[str]":
        """The same, for what may fail."""
        calls = self.directory / "calls"
        calls.write_text("")
        environment = {
            **self.variables,
            "PATH": f"{self.path('bin')}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            "CALLS": str(calls),
            "CLOUD": self.path("cloud"),
            "BROKER": self.path("broker"),
            "DMIGRATE_RABBITMQCTL": str(HERE / "rabbitmqctl"),
            "STUBS": str(HERE / "stubs.sh"),
            "PLUGIN": str(ROOT / "devstack"),
        }
        done = subprocess.run(
            ["bash", "-c", _SCRIPT, "devstack", *phases],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        self.calls = _read(calls)
        return done

    def called(self, name: str) -> list[Call]:
        """The arguments of each call of a function."""
        return [call[1:] for call in self.calls if call[0] == name]

    def broker_calls(self) -> list[Call]:
        """Of rabbitmqctl, in all runs; what only lists is not among them."""
        path = self.directory / "broker" / "calls"
        return _read(path) if path.exists() else []

    def files(self) -> dict[str, str]:
        """Every file below the directory by its name, with its text."""
        return {
            str(path.relative_to(self.directory)): path.read_text()
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name != "calls" and ROOT not in path.resolve().parents
        }


def _read(path: Path) -> list[Call]:
    return [tuple(line.split("\x1f")) for line in path.read_text().splitlines()]

# SPDX-License-Identifier: Apache-2.0
"""The network on which hosts reach storage that runs on this machine: a cable to each of them.

Neither migrations nor servers use it. This machine's ends go with the hosts' namespaces.
"""

import contextlib
import ipaddress
import json
import os
import subprocess
from types import TracebackType

from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts

#: Networks of 16 addresses, of which each lab has one by its process: they are this machine's own.
_NETWORKS = ipaddress.ip_network("198.18.0.0/15")
_BITS = 4
_INTERFACE = "storage"


class StorageNetwork:
    """``address``: this machine's. A context manager."""

    def __init__(self, hosts: LibvirtHosts) -> None:
        networks = 1 << (32 - _BITS - _NETWORKS.prefixlen)
        first = _NETWORKS.network_address + ((os.getpid() % networks) << _BITS)
        self.address = str(first + 1)
        self._cables = {
            f"ndm{os.getpid()}s{number}": (host, str(first + 2 + number))
            for number, host in enumerate((hosts.a, hosts.b))
        }
        try:
            for cable, (host, address) in self._cables.items():
                self._lay(cable, host, address)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StorageNetwork":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Remove it."""
        for cable in self._cables:
            with contextlib.suppress(RuntimeError):  # it has gone with its host
                _run("ip", "link", "delete", cable)

    def carried_to(self, host: LibvirtHost) -> int:
        """Bytes that this machine has sent to a host."""
        (cable,) = (cable for cable, (other, _) in self._cables.items() if other is host)
        (told,) = json.loads(_run("ip", "-s", "-j", "link", "show", "dev", cable))
        carried: int = told["stats64"]["tx"]["bytes"]
        return carried

    def _lay(self, cable: str, host: LibvirtHost, address: str) -> None:
        peer = ["peer", "name", _INTERFACE, "netns", host.namespace]
        _run("ip", "link", "add", cable, "type", "veth", *peer)
        ends = (
            (self.address, address, cable, []),
            (address, self.address, _INTERFACE, ["-n", host.namespace]),
        )
        for own, other, interface, where in ends:
            _run("ip", *where, "address", "add", own, "peer", other, "dev", interface)
            _run("ip", *where, "link", "set", interface, "up")


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout

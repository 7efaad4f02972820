# SPDX-License-Identifier: Apache-2.0
"""The network of the guests and their clients, apart from the one that migrations take.

    with LibvirtHosts(directory) as hosts, GuestNetwork(hosts) as network:
        ...                                     # a domain whose spec has an address
        network.clients.popen(["sysbench", f"--mysql-host={spec.address}", ...])

Each host has a bridge, and both are joined by one in a namespace of the clients: a connection to a
guest lives on when the guest moves. Hosts have an address of their own on it, for what the hosts
and their operators have to say to each other.
"""

import contextlib
import itertools
import os
import subprocess
from types import TracebackType

from tests.lab.hosts import Host
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import end_inmates, register

#: The bridge of the guests, on both hosts and among the clients.
BRIDGE = "guests"
CLIENTS_ADDRESS = "198.51.100.1"
HOST_ADDRESSES = ("198.51.100.11", "198.51.100.12")

_numbers = itertools.count()


def guest_address(number: int) -> str:
    """Address of guest 0, 1, ... 99."""
    return f"198.51.100.{100 + number}"


def guest_mac(address: str) -> str:
    """The MAC address of the guest with an address."""
    return f"02:00:00:00:01:{int(address.rpartition('.')[2]):02x}"


class GuestNetwork:
    """``clients``: the clients' namespace, to run programs in. A context manager."""

    def __init__(self, hosts: LibvirtHosts) -> None:
        self._hosts = (hosts.a, hosts.b)
        name = f"ndm{os.getpid()}n{next(_numbers)}"
        self.clients = Host(hosts.link, name, CLIENTS_ADDRESS, "02:00:00:00:02:01")
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GuestNetwork":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the clients and remove the network. Guests keep an interface that leads nowhere."""
        for host in self._hosts:
            for link in ("uplink", BRIDGE):
                with contextlib.suppress(subprocess.CalledProcessError):
                    host.run(["ip", "link", "delete", link])
        name = self.clients.namespace
        end_inmates(name)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        register.remove("netns", name)

    def _make(self) -> None:
        name = self.clients.namespace
        register.add("netns", name)
        subprocess.run(["ip", "netns", "add", name], check=True)
        self._ip(self.clients, "link set lo up")
        self._make_bridge(self.clients, CLIENTS_ADDRESS)
        for number, (host, address) in enumerate(zip(self._hosts, HOST_ADDRESSES, strict=True)):
            self._make_bridge(host, address)
            cable = f"guests{number}"
            peer = f"peer name uplink netns {host.namespace}"
            self._ip(self.clients, f"link add {cable} type veth {peer}")
            for end, port in ((self.clients, cable), (host, "uplink")):
                self._ip(end, f"link set {port} master {BRIDGE} up")

    def _make_bridge(self, host: Host, address: str) -> None:
        # No spanning tree, no waiting: the network is a tree by its making
        self._ip(host, f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0")
        self._ip(host, f"address add {address}/24 dev {BRIDGE}")
        self._ip(host, f"link set {BRIDGE} up")

    def _ip(self, host: Host, arguments: str) -> None:
        host.run(["ip", *arguments.split()])

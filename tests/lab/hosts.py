# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces and a link that can be shaped, stalled and cut.

    with HostPair() as (a, b):
        a.pair.shape(50e6)                      # 50 MB/s in each direction
        b.popen(["program", "--listen", b.address])
        a.pair.cut()

Names are unique to the process and addresses live in the namespaces, so labs run side by side.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.lab.processes import register, spawn

_numbers = itertools.count()
_NOWHERE = "02:00:00:00:0b:ad"


def _ip(*arguments: str) -> None:
    _checked("ip", *arguments)


def _checked(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")


class Host:
    """One namespace: `address` on the link (interface eth0), and a loopback of its own."""

    def __init__(self, pair: "HostPair", namespace: str, address: str, mac: str) -> None:
        self.pair = pair
        self.namespace = namespace
        self.address = address
        self.mac = mac

    def argv(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs argv in this host, as the same process."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]
        return [*enter, *(os.fspath(a) for a in argv)]

    def run(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> Any:
        """subprocess.run in this host; output is captured as text unless options say otherwise."""
        return subprocess.run(
            self.argv(argv), **{"capture_output": True, "text": True, "check": True, **options}
        )

    def popen(
        self, argv: Sequence[str | os.PathLike[str]], **options: Any
    ) -> "subprocess.Popen[Any]":
        """Start a registered process in this host; end it with processes.end or terminate."""
        return spawn(self.argv(argv), **options)


class HostPair:
    """Two hosts and their link. A context manager that yields both."""

    def __init__(self) -> None:
        base = f"ndm{os.getpid()}x{next(_numbers)}"
        self.a = Host(self, base + "a", "192.0.2.1", "02:00:00:00:00:01")
        self.b = Host(self, base + "b", "192.0.2.2", "02:00:00:00:00:02")
        self._made: list[Host] = []
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> tuple[Host, Host]:
        return self.a, self.b

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def shape(self, rate: float | None) -> None:
        """Limit each direction to `rate` bytes/s of frames, headers included; None: no limit."""
        for host in self._hosts():
            if rate is None:
                host.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False)
                continue
            # 3 ms of data, never less than one unsegmented 64 KiB packet. The queue takes what
            # several connections have under way, as a switch does: four times the burst dropped
            # packets as soon as there were two, which cost a sixth of the rate.
            burst = max(int(rate * 0.003), 70_000)
            shaper = f"tbf rate {int(rate * 8)}bit burst {burst} limit {16 * burst}".split()
            host.run(["tc", "qdisc", "replace", "dev", "eth0", "root", *shaper])

    def cut(self) -> None:
        """Pull the cable: both ends lose their carrier."""
        _ip("-n", self.a.namespace, "link", "set", "eth0", "down")

    def stall(self) -> None:
        """Let packets vanish without any sign, as behind a dead switch: the link stays up."""
        for host in self._hosts():
            self._neighbour(host, _NOWHERE)

    def restore(self) -> None:
        """Undo `cut` and `stall`."""
        _ip("-n", self.a.namespace, "link", "set", "eth0", "up")
        for host in self._hosts():
            self._neighbour(host, self._peer(host).mac)

    def counters(self) -> tuple[int, int]:
        """Bytes that (a, b) have sent over the link, headers included."""
        # over netlink: sysfs shows the namespace of whoever mounted it
        show = ["ip", "-s", "-j", "link", "show", "dev", "eth0"]
        a, b = (json.loads(host.run(show).stdout)[0] for host in self._hosts())
        return a["stats64"]["tx"]["bytes"], b["stats64"]["tx"]["bytes"]

    def carried(self) -> int:
        """Bytes that both have sent."""
        return sum(self.counters())

    def close(self) -> None:
        """Remove the namespaces. What still runs in them keeps running, without a network."""
        while self._made:
            name = self._made.pop().namespace
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            register.remove("netns", name)

    def _hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def _peer(self, host: Host) -> Host:
        return self.b if host is self.a else self.a

    def _neighbour(self, host: Host, mac: str) -> None:
        """Fix the peer's MAC address by hand: a stall needs no ARP that could still answer."""
        entry = [self._peer(host).address, "lladdr", mac, "dev", "eth0", "nud", "permanent"]
        _ip("-n", host.namespace, "neighbour", "replace", *entry)

    def _make(self) -> None:
        for host in self._hosts():
            register.add("netns", host.namespace)
            _ip("netns", "add", host.namespace)
            self._made.append(host)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        veth = ["link", "add", "eth0", "address", self.a.mac, "type", "veth", "peer"]
        peer = ["name", "eth0", "address", self.b.mac, "netns", self.b.namespace]
        _ip("-n", self.a.namespace, *veth, *peer)
        for host in self._hosts():
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        for host in self._hosts():
            self._neighbour(host, self._peer(host).mac)

# SPDX-License-Identifier: Apache-2.0
"""What the hosts' programs take at one moment, and what has grown between two of them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from tests.lab.demo.scene import Scene
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.processes import inmates

#: What may be more without being a leak: a connection or thread of a pool, that was not needed
#: before; memory that an allocator keeps. A program that leaks has more after a few migrations.
ALLOWED = {"processes": 3, "threads": 3, "descriptors": 3, "sockets": 3, "files": 0}
#: MiB, and MiB more for each migration: libvirtd and services keep a little of each for a while.
#: Whole maps go through the operator's memory, of which its allocator gives only a part back.
ALLOWED_RSS, ALLOWED_RSS_EACH, OPERATOR_RSS_EACH = 8.0, 0.2, 1.0
_RSS = "RSS (MiB)"
COLUMNS = (*ALLOWED, _RSS)
_OPERATOR = "operator"
_FORWARDER = "socat"
_PRIVATE = (Path("/run"), Path("/var/lib/libvirt"))
#: Kept on purpose, for days.
_KEPT = "summaries"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Numbers by what they are of, and by column; a column that is not counted there is left out.

    :ivar after: how many migrations have been.
    """

    after: int
    numbers: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, scene: Scene, after: int) -> "Footprint":
        """What there is now."""
        numbers: dict[str, Mapping[str, float]] = {_OPERATOR: _process(os.getpid())}
        for host, letter in ((scene.hosts.a, "A"), (scene.hosts.b, "B")):
            numbers[f"host {letter}"] = _host(host)
            numbers[f"service of {letter}"] = _process(scene.services.pid(host))
            numbers[f"libvirtd of {letter}"] = _process(host.libvirtd_pid)
        numbers["agent"] = _agent(scene)
        return cls(after, numbers)

    def leaks(self, before: "Footprint") -> list[str]:
        """What has grown by more than is allowed since then, in words."""
        found = []
        for name, columns in self.numbers.items():
            each = OPERATOR_RSS_EACH if name == _OPERATOR else ALLOWED_RSS_EACH
            allowed = {**ALLOWED, _RSS: ALLOWED_RSS + each * (self.after - before.after)}
            for column, value in columns.items():
                earlier = before.numbers[name][column]
                if value - earlier > allowed[column]:
                    found.append(
                        f"{column} of {name}: {earlier:g} after {before.after} migrations,"
                        f" {value:g} after {self.after}; {allowed[column]:g} more are allowed"
                    )
        return found

    def table(self, before: "Footprint") -> str:
        """Both, side by side."""
        lines = [_line("", COLUMNS)]
        for name, columns in self.numbers.items():
            cells = [
                f"{before.numbers[name][column]:g} > {columns[column]:g}"
                if column in columns
                else "-"
                for column in COLUMNS
            ]
            lines.append(_line(name, cells))
        return "\n".join(lines)


def _line(name: str, cells: tuple[str, ...] | list[str]) -> str:
    return f"{name:14}" + "".join(f"{cell:>18}" for cell in cells)


def _process(pid: int) -> dict[str, float]:
    here = Path(f"/proc/{pid}")
    descriptors = [os.readlink(each) for each in (here / "fd").iterdir() if each.is_symlink()]
    return {
        "threads": len(list((here / "task").iterdir())),
        "descriptors": len(descriptors),
        "sockets": sum(each.startswith("socket:") for each in descriptors),
        _RSS: _rss((here / "status").read_text()),
    }


def _host(host: LibvirtHost) -> dict[str, float]:
    """All processes on a host, its sockets, and what is in its directories.

    But for the lab's way to the broker: each connection to that costs a process and five sockets
    more than on a host that reaches it by itself.
    """
    sockets = host.run(["ss", "--all", "--no-header", "--processes", "--tcp", "--unix"]).stdout
    processes = inmates(host.namespace).values()
    return {
        "processes": sum(arguments[0] != _FORWARDER for arguments in processes),
        "sockets": sum(
            "TIME-WAIT" not in line and f'"{_FORWARDER}"' not in line
            for line in sockets.splitlines()
        ),
        "files": sum(
            _KEPT not in path.parts for place in _PRIVATE for path in host.outside(place).rglob("*")
        ),
    }


def _agent(scene: Scene) -> dict[str, float]:
    said = scene.guest.run(
        "cd /proc/$(</run/agent.pid); ls task | wc -l; ls fd | wc -l; ls -l fd | grep -c socket:;"
        " grep VmRSS status"
    )
    threads, descriptors, sockets, status = said.splitlines()
    return {
        "threads": int(threads),
        "descriptors": int(descriptors),
        "sockets": int(sockets),
        _RSS: _rss(status),
    }


def _rss(status: str) -> float:
    """MiB of memory, as /proc/PID/status has them."""
    line = next(each for each in status.splitlines() if each.startswith("VmRSS:"))
    return round(int(line.split()[1]) / 1024, 1)

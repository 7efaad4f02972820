# SPDX-License-Identifier: Apache-2.0
"""What the hosts' programs take at some moments, and what has grown between two of them."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from tests.lab.demo.scene import Scene
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.processes import inmates

_RSS = "RSS (MiB)"
#: What may be more without being a leak, however many migrations have been: a connection or thread
#: of a pool, that was not needed before; memory that an allocator keeps.
ALLOWED = {"processes": 3, "threads": 3, "descriptors": 3, "sockets": 3, "files": 0, _RSS: 5.0}
#: The same, but of memory, where there have been so few migrations in between. Each host is the
#: source of every second one: what it leaks then is more than that.
FEW, _ALLOWED_OF_FEW = 4, 1
#: The operator is this program, which keeps what the load has told so far. Maps do not go through
#: it: the source's service has the guest's port and writes their files.
ALLOWED_OPERATOR = {**ALLOWED, _RSS: 10.0}
COLUMNS = tuple(ALLOWED)
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
        """What has grown by more than is allowed since then, in words.

        :param before: of a moment when all that is made only once had been made: what grows from
            there on grows with each migration.
        """
        found = []
        few = self.after - before.after <= FEW
        for name, columns in self.numbers.items():
            usual = ALLOWED_OPERATOR if name == _OPERATOR else ALLOWED
            for column, value in columns.items():
                earlier, allowed = before.numbers[name][column], usual[column]
                if few and column != _RSS:
                    allowed = min(allowed, _ALLOWED_OF_FEW)
                if value - earlier > allowed:
                    found.append(
                        f"{column} of {name}: {earlier:g} after {before.after} migrations,"
                        f" {value:g} after {self.after}; {allowed:g} more are allowed"
                    )
        return found

    def shrank(self, before: "Footprint") -> bool:
        """Whether something has gone since then; memory does not count."""
        return any(
            value < before.numbers[name][column]
            for name, columns in self.numbers.items()
            for column, value in columns.items()
            if column != _RSS
        )

    def table(self, *before: "Footprint") -> str:
        """All of them, side by side, in their order and this one last."""
        moments = (*before, self)
        lines = [_line("", COLUMNS)]
        for name, columns in self.numbers.items():
            cells = [
                " > ".join(f"{each.numbers[name][column]:g}" for each in moments)
                if column in columns
                else "-"
                for column in COLUMNS
            ]
            lines.append(_line(name, cells))
        return "\n".join(lines)


def _line(name: str, cells: tuple[str, ...] | list[str]) -> str:
    return f"{name:14}" + "".join(f"{cell:>24}" for cell in cells)


def _process(pid: int) -> dict[str, float]:
    here = Path(f"/proc/{pid}")
    descriptors = []
    for each in (here / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            descriptors.append(os.readlink(each))
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
        # One that has just ended has no arguments any more
        "processes": sum(arguments[:1] not in ([], [_FORWARDER]) for arguments in processes),
        "sockets": sum(
            "TIME-WAIT" not in line and f'"{_FORWARDER}"' not in line
            for line in sockets.splitlines()
        ),
        "files": sum(_files(host.outside(place)) for place in _PRIVATE),
    }


def _files(place: Path) -> int:
    """How many files and directories there are beneath a directory, while some come and go."""
    count = 0
    for _, directories, files in os.walk(place):
        directories[:] = [name for name in directories if name != _KEPT]
        count += len(directories) + len(files)
    return count


def _agent(scene: Scene) -> dict[str, float]:
    # ls complains of descriptors that are closed while it looks
    said = scene.guest.run(
        "cd /proc/$(</run/agent.pid); ls task 2>/dev/null | wc -l; ls fd 2>/dev/null | wc -l;"
        " ls -l fd 2>/dev/null | grep -c socket:; grep VmRSS status"
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

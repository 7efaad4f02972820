# SPDX-License-Identifier: Apache-2.0
"""Which of Nova's tests run, with which releases of Nova and in which of their backends."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

THREADING = "threading"
EVENTLET = "eventlet"

# The backends that nova-compute has in a release, its default first: before 33 it had only eventlet
RELEASES = {
    34: (THREADING, EVENTLET),
    33: (EVENTLET, THREADING),
    32: (EVENTLET,),
    31: (EVENTLET,),
}


@dataclass(frozen=True)
class Group:
    """Tests that run in one process with each driver.

    :ivar modules: of tests, all of nova.tests.unit or all of nova.tests.functional.
    :ivar select: regular expression that the names of tests must match.
    """

    name: str
    modules: tuple[str, ...]
    select: str = ""


FUNCTIONAL = Group(
    "functional",
    (
        "nova.tests.functional.libvirt.test_live_migration",
        "nova.tests.functional.libvirt.test_numa_live_migration",
        "nova.tests.functional.libvirt.test_evacuate",
        "nova.tests.functional.compute.test_live_migration",
    ),
)
MOVES = "(?i:migrat|rollback|evacuat|rebuild)"
DRIVER = "nova.tests.unit.virt.libvirt.test_driver"
MANAGER = "nova.tests.unit.compute.test_compute_mgr"
SHORT = (FUNCTIONAL, Group("unit", (DRIVER, MANAGER), MOVES))
# All of the driver's tests: ours extends it, and must not change anything else of it by mistake
FULL = (FUNCTIONAL, Group("unit", (DRIVER, MANAGER), f"^{DRIVER}|{MOVES}"))


@dataclass(frozen=True)
class Job:
    """What is compared: a group of tests, on a release of Nova in a backend."""

    release: int
    backend: str
    group: Group

    @property
    def name(self) -> str:
        return f"{self.release}-{self.backend}-{self.group.name}"

    @property
    def title(self) -> str:
        return f"Nova {self.release} {self.backend}"


# Of a release in a backend, tests of Nova's that fail with the stock driver as well, by a regular
# expression of their names, and why
UNSUPPORTED = {
    (33, THREADING): {
        r"^nova\.tests\.functional\.": "threads share a transaction of the database in memory",
        r"\.CacheConcurrencyTestCase\.": "it has greenthreads, which do not run",
    }
}


def jobs_of(releases: Iterable[int], short: bool) -> list[Job]:
    """What is compared, of each release.

    :param short: tests that move servers alone, on the backend that is the release's default.
    """
    return [
        Job(release, backend, group)
        for release in releases
        for backend in (RELEASES[release][:1] if short else RELEASES[release])
        for group in (_supported(each, release, backend) for each in (SHORT if short else FULL))
        if group.modules
    ]


def _supported(group: Group, release: int, backend: str) -> Group:
    """A group without what its release does not support in a backend."""
    unsupported = UNSUPPORTED.get((release, backend))
    if unsupported is None:
        return group
    names = "|".join(unsupported)
    modules = tuple(each for each in group.modules if not re.search(names, f"{each}."))
    return replace(group, modules=modules, select=f"^(?!.*(?:{names})).*(?:{group.select})")

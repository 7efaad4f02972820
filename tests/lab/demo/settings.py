# SPDX-License-Identifier: Apache-2.0
"""What whoever calls `make demo` has chosen, in environment variables."""

import os
from collections.abc import Callable, Mapping

from tests.lab.database_image import MARIADB, MYSQL, Release, database_image
from tests.lab.demo.stage import Shape
from tests.lab.demo.workloads import LOADS
from tests.lab.image import ImageError

_RELEASES = {"mysql": MYSQL, "mariadb": MARIADB}


class WrongSetting(Exception):
    """A variable has a value that makes no sense."""


def shape_from(environment: Mapping[str, str]) -> Shape:
    """The shape that NETWORK, VOLUME (MB/s), POOL (share of RAM), LOAD, RATE (transactions a
    second), DB, RAM (MiB) and COMPRESSION (yes, no) choose.

    :raises WrongSetting: one of them makes no sense.
    """
    usual = Shape(MYSQL)
    shape = Shape(
        _RELEASES[choice_from(environment, "DB", "mysql", _RELEASES)],
        network=number_from(environment, "NETWORK", usual.network, 1, 10_000),
        volume=number_from(environment, "VOLUME", usual.volume, 1, 10_000),
        pool=number_from(environment, "POOL", usual.pool, 0.05, 0.8),
        load=choice_from(environment, "LOAD", usual.load, LOADS),
        rate=number_from(environment, "RATE", usual.rate, 0, 1e6),
        ram_mb=int(number_from(environment, "RAM", usual.ram_mb, 512, os_memory_mb() // 3)),
        compression=choice_from(environment, "COMPRESSION", "yes", ("yes", "no")) == "yes",
    )
    needed = shape.pool_mb + _OTHER_MB[shape.release.flavour]
    if needed > shape.ram_mb:
        raise WrongSetting(
            f"RAM={shape.ram_mb} is too small for POOL={shape.pool:g}: a pool of {shape.pool_mb}"
            f" MiB and all else take {needed} MiB"
        )
    return shape


#: What server, agent and kernel need beside the pool.
_OTHER_MB = {"mysql": 480, "mariadb": 260}


def available_release(wanted: Release, say: Callable[[str], None]) -> Release:
    """The release with its image built, or MariaDB's if that is not possible.

    :raises ImageError: neither can be built.
    """
    say(f"Building the guest's disk with {wanted.flavour} (once, then it is cached)")
    try:
        database_image(wanted)
    except ImageError as error:
        if wanted is MARIADB:
            raise
        say(f"{wanted.flavour} cannot be installed, so it is {MARIADB.flavour}: {error}")
        return available_release(MARIADB, say)
    return wanted


def os_memory_mb() -> int:
    """MiB of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def number_from(
    environment: Mapping[str, str], name: str, usual: float, least: float, most: float
) -> float:
    """The number that a variable has, or the usual one.

    :raises WrongSetting: it is no number, or not between ``least`` and ``most``.
    """
    text = environment.get(name) or str(usual)
    try:
        value = float(text)
    except ValueError:
        raise WrongSetting(f"{name}={text} is no number") from None
    if not least <= value <= most:
        raise WrongSetting(f"{name}={text} is not between {least:g} and {most:g}")
    return value


def choice_from(
    environment: Mapping[str, str],
    name: str,
    usual: str,
    known: Mapping[str, object] | tuple[str, ...],
) -> str:
    """What a variable chooses, or the usual choice.

    :raises WrongSetting: it is not known.
    """
    value = environment.get(name) or usual
    if value not in known:
        raise WrongSetting(f"{name}={value} is not one of {', '.join(known)}")
    return value

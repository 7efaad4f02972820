# SPDX-License-Identifier: Apache-2.0
"""What whoever calls `make demo` has chosen, in environment variables."""

import math
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
    release = release_from(environment)
    pool = number_from(environment, "POOL", usual.pool, 0.05, 0.8)
    return Shape(
        release,
        network=number_from(environment, "NETWORK", usual.network, 1, 10_000),
        volume=number_from(environment, "VOLUME", usual.volume, 1, 10_000),
        pool=pool,
        load=choice_from(environment, "LOAD", usual.load, LOADS),
        rate=number_from(environment, "RATE", usual.rate, 0, 1e6),
        ram_mb=_ram_from(environment, usual.ram_mb, release, pool),
        compression=choice_from(environment, "COMPRESSION", "yes", ("yes", "no")) == "yes",
    )


def release_from(environment: Mapping[str, str]) -> Release:
    """The release that DB chooses.

    :raises WrongSetting: it is none.
    """
    return _RELEASES[choice_from(environment, "DB", "mysql", _RELEASES)]


def _ram_from(environment: Mapping[str, str], usual: int, release: Release, pool: float) -> int:
    """MiB of a guest, in which a pool of that share has room.

    :raises WrongSetting: the variable makes no sense, or the machine is too small.
    """
    least = max(_LEAST_MB, math.ceil(_OTHER_MB[release.flavour] / (1 - pool)))
    has = os_memory_mb()
    most = has // _MACHINE_SHARE
    if least > most:
        raise WrongSetting(
            f"POOL={pool:g} needs RAM={least} at least, and a machine with {_MACHINE_SHARE} times"
            f" as much: this one has {has} MiB"
        )
    why = (
        f"with less a pool of POOL={pool:g} has no room beside all else, and with more two hosts"
        f" have no room for it on this machine, which has {has} MiB"
    )
    return int(number_from(environment, "RAM", usual, least, most, why))


#: MiB of the smallest guest; what server, agent and kernel need beside the pool; what part of the
#: machine a guest may have: while it migrates, its memory is at both hosts.
_LEAST_MB = 512
_OTHER_MB = {"mysql": 480, "mariadb": 260}
_MACHINE_SHARE = 3


def available_release(
    wanted: Release,
    say: Callable[[str], None],
    built: Callable[[Release], Release] = lambda release: release,
) -> Release:
    """The release with its image built, or MariaDB's if that is not possible.

    :param built: what its image is built of.
    :raises ImageError: neither can be built.
    """
    say(f"Building the guest's disk with {wanted.flavour} (once, then it is cached)")
    try:
        database_image(built(wanted))
    except ImageError as error:
        if wanted is MARIADB:
            raise
        say(f"{wanted.flavour} cannot be installed, so it is {MARIADB.flavour}: {error}")
        return available_release(MARIADB, say, built)
    return wanted


def os_memory_mb() -> int:
    """MiB of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def number_from(
    environment: Mapping[str, str],
    name: str,
    usual: float,
    least: float,
    most: float,
    why: str = "",
) -> float:
    """The number that a variable has, or the usual one.

    :param why: it has to be between those, for whoever reads the error.
    :raises WrongSetting: it is no number, or not between ``least`` and ``most``.
    """
    text = environment.get(name) or str(usual)
    try:
        value = float(text)
    except ValueError:
        raise WrongSetting(f"{name}={text} is no number") from None
    if not least <= value <= most:
        reason = f": {why}" if why else ""
        raise WrongSetting(f"{name}={text} is not between {least:g} and {most:g}{reason}")
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

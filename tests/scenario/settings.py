# SPDX-License-Identifier: Apache-2.0
"""What the environment says of the cloud."""

import dataclasses
import enum
from collections.abc import Mapping


class Expectation(str, enum.Enum):
    """What migrations of servers that prefer the relays have to be."""

    DMIGRATE = "dmigrate"  # through the relays
    ORDINARY = "ordinary"  # Nova's own: the guests have no agent
    EITHER = "either"  # with a reason, if not through the relays


class SettingsError(Exception):
    """The environment lacks something, or says what cannot be."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """See `from_environment`, by the names of the variables.

    :ivar memory: MiB. :ivar disk: GiB. :ivar timeout: seconds.
    """

    cloud: str
    server: str | None
    image: str | None
    network: str
    memory: int
    processors: int
    disk: int
    keypair: str | None
    prepare: str | None
    expectation: Expectation
    timeout: float


def from_environment(environment: Mapping[str, str]) -> Settings:
    """What the tests shall do.

    OS_CLOUD
        Name in clouds.yaml, of an administrator.
    DMIGRATE_SERVER
        A server that is there, by name or ID: it is migrated, and none is made.
    DMIGRATE_IMAGE
        Else the image, by name or ID, that servers are made of.
    DMIGRATE_NETWORK
        Their network, by name or ID; ``none`` or ``auto`` as in Nova's API. Default: ``auto``.
    DMIGRATE_MEMORY, DMIGRATE_PROCESSORS, DMIGRATE_DISK
        Their MiB (512), number (1), and GiB of the volume that they boot from (10).
    DMIGRATE_KEYPAIR
        The keypair that they get, for DMIGRATE_PREPARE. Default: none.
    DMIGRATE_PREPARE
        A command of the shell that is run when a server is there, with ``SERVER_ID``,
        ``SERVER_NAME`` and ``SERVER_ADDRESS``, the first that it has, in its environment. It
        returns when the agent can be asked.
    DMIGRATE_EXPECT
        ``dmigrate``, ``ordinary`` or ``either``, the default.
    DMIGRATE_TIMEOUT
        Seconds that a server may take to start, to migrate or to go. Default: 600.

    :raises SettingsError: something is missing, or cannot be.
    """
    cloud = environment.get("OS_CLOUD", "")
    if not cloud:
        raise SettingsError("OS_CLOUD is not set: these tests need a cloud")
    server, image = environment.get("DMIGRATE_SERVER"), environment.get("DMIGRATE_IMAGE")
    if bool(server) == bool(image):
        raise SettingsError("either DMIGRATE_SERVER or DMIGRATE_IMAGE has to be set")
    expected = environment.get("DMIGRATE_EXPECT") or Expectation.EITHER.value
    try:
        expectation = Expectation(expected)
    except ValueError:
        known = ", ".join(each.value for each in Expectation)
        raise SettingsError(f"DMIGRATE_EXPECT is {expected!r}, not one of {known}") from None
    return Settings(
        cloud=cloud,
        server=server or None,
        image=image or None,
        network=environment.get("DMIGRATE_NETWORK") or "auto",
        memory=_number(environment, "DMIGRATE_MEMORY", 512),
        processors=_number(environment, "DMIGRATE_PROCESSORS", 1),
        disk=_number(environment, "DMIGRATE_DISK", 10),
        keypair=environment.get("DMIGRATE_KEYPAIR") or None,
        prepare=environment.get("DMIGRATE_PREPARE") or None,
        expectation=expectation,
        timeout=float(_number(environment, "DMIGRATE_TIMEOUT", 600)),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise SettingsError(f"{name} is {text!r}, not a number above 0")
    return int(text)

# SPDX-License-Identifier: Apache-2.0
"""How the source's host vouches for the volumes that the destination's relay may read.

The source's service looks whether they are disks of the guest that migrates. Both services bind
the migration's token to the volumes that they were told of: a destination relay that was told of
others than the source's service has looked at does not get to know its source relay, and without
that it reads nothing.
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Sequence

from nova_dmigrate import exception
from nova_dmigrate.rpc.host_messages import OpenSource, Volume
from nova_dmigrate.volumes import VolumeSpec

#: The disks of a running domain that can be read at all, by its name or UUID. Raises
#: MigrationError: they are not known, or there are none.
Disks = Callable[[str], Sequence[VolumeSpec]]


def check(order: OpenSource, disks: Disks) -> None:
    """See that the volumes of an order are disks of its guest.

    :raises RequestRefused: one of them is not, or that cannot be found out.
    """
    if not order.volumes:
        return
    try:
        own = {each.volume_id: each for each in disks(order.domain or order.instance)}
    except exception.MigrationError as error:
        raise exception.RequestRefused(
            reason=f"the disks of instance {order.instance} are not known: {error}",
            code="disks-unknown",
        ) from error
    for volume in order.volumes:
        disk = own.get(volume.volume_id)
        if disk is None or disk.driver != volume.driver:
            raise _strange(order, volume)
        if disk.location != volume.location and not order.volumes_connected:
            raise _strange(order, volume)


def bound_token(token: str, volumes: Sequence[Volume]) -> str:
    """What the relays of a migration with these volumes have in common.

    :param token: 64 hexadecimal digits, and so is what is returned.
    """
    text = json.dumps([[each.volume_id, each.driver, each.location] for each in volumes])
    return hmac.digest(bytes.fromhex(token), text.encode(), hashlib.sha256).hex()


def _strange(order: OpenSource, volume: Volume) -> exception.RequestRefused:
    return exception.RequestRefused(
        reason=f"volume {volume.volume_id} at {volume.location} is no disk of instance"
        f" {order.instance}",
        code="volume-not-allowed",
    )

# SPDX-License-Identifier: Apache-2.0
"""The passphrases of encrypted volumes, as libvirt has them to give them to QEMU."""

import contextlib

import libvirt  # type: ignore[import-untyped]

from nova_dmigrate import exception
from nova_dmigrate.migration.waiting import answer_within


def key_of(uri: str, uuid: str, patience: float) -> bytes:
    """The value of a secret for the use ``volume``. Others, as those of Ceph, are not told.

    :param uri: of this host's libvirt. :param patience: seconds for all of it.
    :raises HypervisorError: there is none, or it is not told, or not in time.
    """
    try:
        return answer_within(patience, lambda: _value(uri, uuid), lambda: None)
    except (libvirt.libvirtError, TimeoutError) as error:
        raise exception.HypervisorError(peer=uri, reason=f"secret {uuid}: {error}") from error


def _value(uri: str, uuid: str) -> bytes:
    # It tells its errors on standard error as well
    libvirt.registerErrorHandler(lambda context, error: None, None)
    with contextlib.closing(libvirt.open(uri)) as connection:
        secret = connection.secretLookupByUUIDString(uuid)
        if secret.usageType() != libvirt.VIR_SECRET_USAGE_TYPE_VOLUME:
            raise exception.HypervisorError(
                peer=uri, reason=f"secret {uuid} is for another use than a volume"
            )
        return bytes(secret.value())

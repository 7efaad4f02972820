# SPDX-License-Identifier: Apache-2.0
"""Reader of images in formats of QEMU's: a qemu-storage-daemon opens them, NBD brings them.

``qcow2``
    with its backing files, encrypted or not (LUKS within the image). The guest's QEMU changes the
    tables of where clusters lie while they are read here: they are read in small parts, each just
    before its use. What is found by one that has changed meanwhile is wrong: never used, as digests
    decide, but a miss. Two things are read once: the topmost table, one entry of which stands for
    512 MiB in the usual case, and how long the file is. So where the guest writes for the first
    time after the image was opened, that is a miss if the file has grown for it; where it had
    written before, as databases do, it is seen at once.
``luks``
    raw and encrypted by QEMU. Its header stays as it is: whatever the guest has written is seen.
``raw``
    a unit of an iSCSI target, to which QEMU connects by itself; or a file or a device, which the
    driver ``block`` reads with less in between.

The image is opened read-only and past the host's page cache. No lock of it is taken, so that a QEMU
finds none that it did not expect, whether it is there already or comes later.
"""

import collections
import contextlib
import os
import shutil
from collections.abc import Iterator

from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.volumes import base, image_layers
from nova_dmigrate.volumes.image_location import ImageLocation
from nova_dmigrate.volumes.nbd_connection import ConnectionFailed, NbdConnection, NoAnswer
from nova_dmigrate.volumes.storage_daemon import EXPORT, PROGRAM, StorageDaemon
from nova_dmigrate.volumes.uses import Uses

LOG = logging.getLogger(__name__)

#: Opening an image takes so many times the time limit at most: to find out whether a passphrase is
#: the right one takes seconds by design.
_OPENING = 3
#: Seconds in which a daemon that cannot open the image has said so.
_LAST_WORDS = 1.0


def usable() -> bool:
    """Whether this host has what it takes."""
    return shutil.which(PROGRAM) is not None


class NbdReader(base.VolumeReader):
    """The image at ``spec.location``, an :class:`ImageLocation` as text. The passphrase of LUKS is
    ``spec.secret``, or the key that the host has by the name in the location.

    A read takes ``access.timeout`` at most until its first data come, and from one piece to the
    next; opening takes three times that. Reads of many threads have a connection each, and go on
    at the same time.

    :raises VolumeOpenError: there is no qemu-storage-daemon, or it cannot open the image.
    """

    def __init__(self, spec: base.VolumeSpec, access: base.VolumeAccess) -> None:
        self.volume_id = spec.volume_id
        self._timeout = access.timeout
        self._uses = Uses(self.volume_id, self._give_back)
        #: Connections that nobody reads by; its methods are atomic.
        self._idle: collections.deque[NbdConnection] = collections.deque()
        try:
            location = ImageLocation.parse(spec.location)
            key = _key(location, spec.secret, access.keys)
            image = image_layers.blockdev(location, bool(key))
            keys = {image_layers.KEY: key} if key else {}
            self._daemon = StorageDaemon(image, keys, access.runtime_directory)
        except (OSError, ValueError, exception.HypervisorError) as error:
            raise self._open_error(f"{spec.location} cannot be opened: {_reason(error)}") from error
        try:
            with self._connect(_OPENING * self._timeout) as connection:
                self.size = connection.size
        except ConnectionFailed as error:
            # One that does not come up has said why, if it was not for the time limit
            said = self._daemon.said if self._daemon.ended(_LAST_WORDS) else ""
            self._give_back()
            raise self._open_error(f"{spec.location} is not opened: {said or error}") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.check_range(offset, buffer.nbytes)
        try:
            with self._connection() as connection:
                number = connection.read(offset, buffer.cast("B"))
        except NoAnswer as error:
            raise exception.VolumeTimeoutError(**self._told(offset, str(error))) from error
        except ConnectionFailed as error:
            raise exception.VolumeReadError(**self._told(offset, str(error))) from error
        if number:
            raise exception.VolumeReadError(**self._told(offset, os.strerror(number)))

    def close(self) -> None:
        self._uses.close()

    # Reading

    @contextlib.contextmanager
    def _connection(self) -> Iterator[NbdConnection]:
        """One that nobody else uses meanwhile. One that fails is not used again.

        :raises ConnectionFailed: there is none to be had.
        :raises VolumeReadError: the reader was closed.
        """
        self._uses.begin()
        connection = None
        try:
            with contextlib.suppress(IndexError):
                connection = self._idle.pop()
            if connection is None:
                connection = self._connect(self._timeout)
            yield connection
            self._idle.append(connection)
        except ConnectionFailed as error:
            if connection is not None:
                connection.close()
            raise type(error)(self._why(error)) from error
        finally:
            self._uses.end()

    def _connect(self, timeout: float) -> NbdConnection:
        return NbdConnection(self._daemon.address, EXPORT, timeout)

    def _give_back(self) -> None:
        for connection in self._idle:
            connection.close()
        if not self._daemon.stop(self._timeout):
            LOG.warning("Volume %s: its %s cannot be ended yet", self.volume_id, PROGRAM)

    # Errors

    def _why(self, error: ConnectionFailed) -> str:
        if not self._daemon.ended(0):
            return str(error)
        return f"its {PROGRAM} has ended: {self._daemon.said or 'it was killed'}"

    def _open_error(self, reason: str) -> exception.VolumeOpenError:
        return exception.VolumeOpenError(volume=self.volume_id, reason=reason)

    def _told(self, offset: int, reason: str) -> dict[str, str]:
        return {"volume": self.volume_id, "reason": f"reading at byte {offset}: {reason}"}


def _key(location: ImageLocation, secret: str, keys: base.Keys | None) -> bytes:
    """What opens it; empty for one that is not encrypted.

    :raises HypervisorError: the host does not have it.
    :raises ValueError: the host gives no keys to relays.
    """
    if secret or not location.key:
        return secret.encode()
    if keys is None:
        raise ValueError("relays of this host are given no keys ([host]volume_keys)")
    return keys(location.key)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

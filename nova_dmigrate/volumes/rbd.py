# SPDX-License-Identifier: Apache-2.0
"""Reader of an RBD image of Ceph, past any cache of this host.

The image is opened read-only: no watcher is added and the exclusive lock, which is the guest's, is
never asked for. What Ceph does not answer in time is an error, because a cluster that hangs would
hold up the migration otherwise.

Objects that do not exist are read like others. The OSD says so in a tenth of the time that data of
that length takes, while asking the object map for it (each time, or what the guest has just written
would be missed) takes as long as that answer.
"""

import dataclasses
import errno
import importlib.util
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.volumes import base
from nova_dmigrate.volumes.rbd_location import RbdLocation
from nova_dmigrate.volumes.uses import Uses

LOG = logging.getLogger(__name__)

#: Ceph's own, of which Debian's packages are python3-rados and python3-rbd.
_MODULES = ("rados", "rbd")
#: Ceph's own time limits come first: they end the operation as well.
_LAST_RESORT = 1.5
#: Seconds after which an OSD that does not answer may be elsewhere.
_LAGGY = "1"


def usable() -> bool:
    """Whether this host has what it takes."""
    return all(importlib.util.find_spec(module) for module in _MODULES)


class RbdReader(base.VolumeReader):
    """The image at ``spec.location``, an :class:`RbdLocation` as text.

    A read takes 1.5 times ``access.timeout`` at most. Opening asks Ceph for one thing after the
    other, a dozen at most, each of which has ``access.timeout``.

    :param access: this host's own account with Ceph counts more than the location's.
    :raises VolumeOpenError: Ceph's Python modules are missing, or the image cannot be opened.
    """

    def __init__(self, spec: base.VolumeSpec, access: base.VolumeAccess) -> None:
        self.volume_id = spec.volume_id
        self._timeout = access.timeout
        self._uses = Uses(self.volume_id, self._give_back)
        self._closers: list[Callable[[], None]] = []
        try:
            place = RbdLocation.parse(spec.location)
        except ValueError as error:
            raise self._open_error(f"its location is not understood: {error}") from error
        try:
            self._image = self._open(_with_own_account(place, access), spec.secret, access)
            self.size: int = self._image.size()
        except BaseException as error:
            self._give_back()
            if isinstance(error, exception.VolumeError) or not isinstance(error, Exception):
                raise
            # Ceph's modules have errors for what is asked of them, too
            raise self._open_error(f"{place.name} cannot be used: {_reason(error)}") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._finish(self._begin(offset, buffer))

    def close(self) -> None:
        self._uses.close()

    # Opening and closing

    def _open(self, place: RbdLocation, secret: str, access: base.VolumeAccess) -> Any:
        """The image; what has to be closed comes into ``_closers``."""
        try:
            rados, rbd = map(importlib.import_module, _MODULES)
        except ImportError as error:
            raise self._open_error(
                f"reading RBD needs Ceph's Python modules rados and rbd, for this Python ({error}):"
                " install the packages python3-rados and python3-rbd"
            ) from error
        client = f"client.{place.user or 'admin'}"
        configuration = _configuration_file(place)
        try:
            cluster = rados.Rados(
                name=client,
                clustername=place.cluster or "ceph",
                conffile=configuration or None,
                conf=_options(place, secret, access.timeout, with_monitors=not configuration),
            )
            self._closers.append(cluster.shutdown)
        except rados.Error as error:
            raise self._open_error(
                f"Ceph's configuration {configuration} cannot be used: {_reason(error)}"
            ) from error
        try:
            cluster.connect()
        except rados.Error as error:
            where = f"of {configuration}" if configuration else place.monitors
            raise self._open_error(_refusal(error, client, f"the monitors {where}")) from error
        try:
            pool = cluster.open_ioctx(place.pool)
            self._closers.append(pool.close)
            pool.set_namespace(place.namespace)
        except rados.Error as error:
            raise self._open_error(
                f"pool {place.pool} cannot be opened by {client}: {_reason(error)}"
            ) from error
        try:
            image = rbd.Image(pool, place.image, snapshot=place.snapshot or None, read_only=True)
        except rbd.Error as error:
            raise self._open_error(
                f"RBD image {place.name} cannot be opened by {client}: {_reason(error)}"
            ) from error
        self._closers.append(image.close)
        return image

    def _give_back(self) -> None:
        """Close all; what hangs there is left to hang."""
        thread = threading.Thread(target=self._close_all, name="rbd-close", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            LOG.warning("Volume %s: Ceph keeps its image open", self.volume_id)

    def _close_all(self) -> None:
        while self._closers:
            closer = self._closers.pop()
            try:
                closer()
            except Exception as error:
                LOG.warning("Volume %s: closing it: %s", self.volume_id, error)

    def _open_error(self, reason: str) -> exception.VolumeOpenError:
        return exception.VolumeOpenError(volume=self.volume_id, reason=reason)

    # Reading

    def _begin(self, offset: int, buffer: memoryview) -> "_Read":
        self.check_range(offset, buffer.nbytes)
        self._uses.begin()
        read = _Read(offset, buffer)
        try:
            self._image.aio_read(offset, buffer.nbytes, read.answer)
        except Exception as error:
            self._uses.end()
            raise self._read_error(read, _reason(error)) from error
        return read

    def _finish(self, read: "_Read") -> None:
        """Wait for a read, and fill its buffer."""
        answered = read.wait(self._timeout * _LAST_RESORT)
        self._uses.end()
        if not answered or read.status == -errno.ETIMEDOUT:
            raise exception.VolumeTimeoutError(
                volume=self.volume_id,
                reason=f"reading at byte {read.offset}: Ceph has not answered in time",
            )
        if read.status < 0:
            raise self._read_error(read, os.strerror(-read.status))
        if len(read.data) != read.buffer.nbytes:
            raise self._read_error(read, "the volume ends there")
        read.buffer.cast("B")[:] = read.data

    def _read_error(self, read: "_Read", reason: str) -> exception.VolumeReadError:
        return exception.VolumeReadError(
            volume=self.volume_id, reason=f"reading at byte {read.offset}: {reason}"
        )


class _Read:
    """A read under way.

    Its data come into memory of their own first: they may come when nobody waits for them any more,
    and the buffer serves another read.
    """

    def __init__(self, offset: int, buffer: memoryview) -> None:
        self.offset = offset
        self.buffer = buffer
        self.status = 0
        self.data = b""
        self._begun = time.monotonic()
        self._answered = threading.Event()

    def answer(self, completion: Any, data: bytes | None) -> None:
        """Called by librbd, in a thread of its own."""
        self.status = completion.get_return_value()
        self.data = data or b""
        self._answered.set()

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within so many seconds from the read's beginning."""
        return self._answered.wait(max(0.0, self._begun + seconds - time.monotonic()))


def _with_own_account(place: RbdLocation, access: base.VolumeAccess) -> RbdLocation:
    return dataclasses.replace(
        place,
        user=access.rbd_user or place.user,
        configuration=access.rbd_configuration or place.configuration,
        keyring=access.rbd_keyring or place.keyring,
    )


def _configuration_file(place: RbdLocation) -> str:
    """Ceph's configuration; empty if this host has none, and the location will do.

    The host's monitors count more than the location's: Nova keeps those that a volume was attached
    with, while monitors come and go, and it is not for others to say to whom this host talks.
    """
    if place.configuration:
        return place.configuration
    usual = f"/etc/ceph/{place.cluster or 'ceph'}.conf"
    return "" if place.monitors and not os.path.exists(usual) else usual


def _options(
    place: RbdLocation, secret: str, timeout: float, *, with_monitors: bool
) -> dict[str, str]:
    """Options for Ceph that count more than those of its configuration file."""
    seconds = str(math.ceil(timeout))
    options = {
        "rbd_cache": "false",
        "client_mount_timeout": seconds,
        "rados_mon_op_timeout": seconds,
        "rados_osd_op_timeout": seconds,
        # Only of an operation that takes longer than that the monitors are asked where OSDs are by
        # now: by default 10 seconds, which none is given here
        "objecter_timeout": _LAGGY,
        "objecter_tick_interval": _LAGGY,
    }
    if with_monitors:
        options["mon_host"] = place.monitors
    if place.keyring:
        options["keyring"] = place.keyring
    if secret:
        options["key"] = secret
    return options


def _refusal(error: Exception, client: str, where: str) -> str:
    """Why a client cannot connect."""
    if getattr(error, "errno", None) == errno.ETIMEDOUT:
        return f"{where} do not answer {client} in time"
    return f"{where} refuse {client}, whose keyring is missing or wrong: {_reason(error)}"


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(abs(number)) if number else str(error)

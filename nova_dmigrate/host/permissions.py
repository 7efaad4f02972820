# SPDX-License-Identifier: Apache-2.0
"""What of this host a requester may have opened: volumes, maps, sockets and ports of guests."""

import contextlib
import dataclasses
import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.volumes import ImageLocation, RbdLocation, image_layers


def volume_location(location: str, allowed: Sequence[str]) -> str:
    """Where a volume really lies, if it may be read.

    :param allowed: directories of files, paths of block devices with ``*``; empty allows all.
    :raises RequestRefused: it may not.
    """
    real = os.path.realpath(location)
    if allowed and not any(
        _is_below(real, entry) or _is_device(location, real, entry) for entry in allowed
    ):
        raise exception.RequestRefused(
            reason=f"volumes at {location} are not read on this host", code="volume-not-allowed"
        )
    return real


def image(location: str, allowed: Sequence[str], units: Sequence[str] = ()) -> str:
    """The location of an image, where that really lies, if it and its backing files may be read.

    :param allowed: as for `volume_location`. :param units: of iSCSI targets, as URLs with ``*``;
        empty allows none.
    :raises RequestRefused: it, or one of them, may not.
    """
    try:
        given = ImageLocation.parse(location)
    except ValueError as error:
        raise exception.RequestRefused(reason=str(error), code="volume-not-allowed") from error
    if given.remote:
        if not any(_matches(given.place, entry) for entry in units):
            raise exception.RequestRefused(
                reason=f"{given.place} is not read on this host", code="volume-not-allowed"
            )
        return str(given)
    real = dataclasses.replace(given, place=volume_location(given.place, allowed))
    # What cannot be opened is the relay's matter: that costs the volume, not the migration
    with contextlib.suppress(OSError, ValueError):
        for layer in image_layers.layers(real):
            volume_location(layer.place, allowed)
    return str(real)


def rbd_image(location: str, allowed: Sequence[str]) -> None:
    """See that an RBD image may be read.

    :param allowed: names of images with ``*``; empty allows all.
    :raises RequestRefused: it may not, or the location names files, which are this host's matter.
    """
    try:
        place = RbdLocation.parse(location)
    except ValueError as error:
        raise exception.RequestRefused(reason=str(error), code="volume-not-allowed") from error
    # Ceph's configuration can name libraries to be loaded and files to be written
    if place.configuration or place.keyring:
        raise exception.RequestRefused(
            reason=f"{location} names files: Ceph's configuration and keyring are the host's own",
            code="volume-not-allowed",
        )
    if allowed and not any(_matches(place.name, entry) for entry in allowed):
        raise exception.RequestRefused(
            reason=f"RBD image {place.name} is not read on this host", code="volume-not-allowed"
        )


def map_file(path: str, allowed: Sequence[str]) -> str:
    """Where a buffer map, or a memory layout, really lies, if it may be read.

    :param allowed: directories.
    :raises RequestRefused: it may not.
    """
    real = os.path.realpath(path)
    if not any(_is_below(real, entry) for entry in allowed):
        raise exception.RequestRefused(
            reason=f"{path} is not where this host has its buffer maps", code="map-not-allowed"
        )
    return real


@contextlib.contextmanager
def map_to_write(path: str, allowed: Sequence[str]) -> Iterator[int]:
    """A descriptor of a buffer map into which the service may write.

    The file has to be there, and to lie in one of the ``allowed`` directories itself. No name is
    looked up twice, and no link is followed to it: others may change what is in the directory.

    :raises RequestRefused: it may not be written, or cannot be opened.
    """
    parent, name = os.path.split(os.path.normpath(path))
    real = os.path.realpath(parent)
    directory = next((each for each in allowed if os.path.realpath(each) == real), None)
    if directory is None or not name:
        raise exception.RequestRefused(
            reason=f"{path} is not where this host has its buffer maps", code="map-not-allowed"
        )
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Whatever it is: nobody is waited for
            descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        finally:
            os.close(place)
    except OSError as error:
        raise exception.RequestRefused(
            reason=f"the buffer map cannot be opened: {error}", code="map-file"
        ) from error
    try:
        status = os.fstat(descriptor)
        # By a second link it would be some other file, which is no business of ours
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise exception.RequestRefused(
                reason=f"{path} is no file with one name", code="map-not-allowed"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def socket_directory(socket: str, directory: Path) -> str | None:
    """The directory of a socket for QEMU, if that is the session's own.

    :param directory: the host's, in which or in a directory of which sockets may be.
    :raises RequestRefused: it may not be there.
    """
    parent, name = os.path.split(os.path.normpath(socket))
    own = Path(parent)
    # The relays' own sockets are there as well
    if socket == f"{parent}/{name}" and not name.endswith(".control"):
        if own == directory:
            return None
        if own.parent == directory and not own.is_symlink():
            return parent
    raise exception.RequestRefused(
        reason=f"sockets for QEMU are in {directory}, not at {socket}", code="socket-not-allowed"
    )


def channel(path: str, allowed: Sequence[str]) -> str:
    """The real path of the socket of a guest's port, if it may be used.

    :raises RequestRefused: it may not, or is not there.
    """
    real = os.path.realpath(path)
    if not any(_is_below(real, entry) for entry in allowed):
        raise exception.RequestRefused(
            reason=f"{path} is not where the ports of guests are", code="channel-not-allowed"
        )
    try:
        is_socket = stat.S_ISSOCK(os.stat(real).st_mode)
    except OSError as error:
        raise exception.RequestRefused(
            reason=f"the guest's port is not there: {error}", code="agent-unreachable"
        ) from error
    if not is_socket:
        raise exception.RequestRefused(reason=f"{path} is no socket", code="channel-not-allowed")
    return real


def _is_below(real: str, entry: str) -> bool:
    directory = os.path.realpath(entry)
    return os.path.commonpath([real, directory]) == directory


def _is_device(location: str, real: str, entry: str) -> bool:
    if not _matches(os.path.normpath(location), entry):
        return False
    try:
        return real.startswith("/dev/") and stat.S_ISBLK(os.stat(real).st_mode)
    except OSError:
        return False


def _matches(name: str, entry: str) -> bool:
    """``*`` does not stand for a further ``/``."""
    return name.count("/") == entry.count("/") and fnmatch.fnmatchcase(name, entry)

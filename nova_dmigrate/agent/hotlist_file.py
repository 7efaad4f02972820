# SPDX-License-Identifier: Apache-2.0
"""Reading and replacing files in the directory in which a server keeps its list of hot pages.

What is written there is written as the server's own account would: the kernel checks its rights,
not ours, and the file is the server's. For that a thread takes the account for the duration of the
write (setfsuid); it gives up the powers of root over files meanwhile.

A file is replaced as a whole: a new one is written beside it, brought to the disk and given its
name. Whatever is killed in between, the name leads to a whole list, the old one or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import cancellation, hotlist, processes

DEFAULT_NAME = "ib_buffer_pool"
# What passes between the agent and the server: never loaded by the server of its own accord
_TRANSFER_SUFFIX = ".dmigrate"
# The list, while something else has its name
_SAVED_SUFFIX = ".dmigrate-saved"
_NEW_SUFFIX = ".new"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MODE = 0o640
_BYTES_PER_SECOND = 8 << 20
# So much room for the database itself is left on its volume
_RESERVE = 64 << 20
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ID = 0xFFFFFFFF
_OPTIONS = re.compile(r"--(innodb[-_](?:buffer[-_]pool[-_]filename|data[-_]home[-_]dir))=(.*)")

U64 = NDArray[np.uint64]

_libc = ctypes.CDLL(None)
for _name in ("setfsuid", "setfsgid"):
    getattr(_libc, _name).argtypes = [ctypes.c_uint32]
    getattr(_libc, _name).restype = ctypes.c_uint32


@dataclasses.dataclass(frozen=True)
class Account:
    """The account of a server, by numbers as this process sees them."""

    uid: int
    gid: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a server keeps its list: name of the file, and its directory as the server sees it."""

    name: str = DEFAULT_NAME
    directory: str = ""


def place_of(server: processes.ServerProcess) -> Place:
    """As far as the command line of a server tells, else where it is by default.

    :raises ServerNotFound: if the server has ended.
    :raises StorageError: if the place is not one that can be written to.
    """
    try:
        with open(f"/proc/{server.pid}/cmdline", encoding="utf-8", errors="replace") as file:
            arguments = file.read().split("\0")
    except OSError as error:
        raise processes.process_error(server.pid, error) from error
    values = {}
    for argument in arguments:
        match = _OPTIONS.fullmatch(argument)
        if match:
            values[match[1].replace("-", "_")] = match[2]
    return checked(
        values.get("innodb_buffer_pool_filename", DEFAULT_NAME),
        values.get("innodb_data_home_dir", ""),
    )


def checked(name: str, directory: str) -> Place:
    """The place of that name.

    :raises StorageError: with code ``unusual-name`` if it is not a plain name.
    """
    if not _NAME.fullmatch(name):
        raise exception.StorageError(
            path=name,
            reason="innodb_buffer_pool_filename is not the plain name of a file",
            code="unusual-name",
        )
    return Place(name, directory)


class ListDirectory:
    """The directory of one server's list. Use as a context manager.

    :raises StorageError: if it cannot be opened.
    :raises ServerNotFound: if the server has ended.
    """

    def __init__(self, server: processes.ServerProcess, place: Place) -> None:
        self._server = server
        self.path = place.directory or server.datadir
        self.name = place.name
        self.transfer = place.name + _TRANSFER_SUFFIX
        self._saved = place.name + _SAVED_SUFFIX
        self._account = _account_of(server)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._descriptor = os.open(server.path(self.path), flags)
        except OSError as error:
            raise self._error(error, self.path) from error

    def __enter__(self) -> ListDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def lines(self) -> int:
        """How many pages are on the list; 0 if there is none."""
        count = 0
        try:
            with self._open(self.name) as file:
                # No more than can be of use: the file is not ours
                for _ in range(hotlist.MAX_PAGES * hotlist.MAX_LINE_BYTES >> 20):
                    piece = file.read(1 << 20)
                    if not piece:
                        break
                    count += piece.count(b"\n")
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._error(error, self.name) from error
        return count

    def age(self) -> float | None:
        """Seconds since the list was replaced, by the wall clock; None if there is none."""
        try:
            status = os.stat(self.name, dir_fd=self._descriptor)
        except FileNotFoundError:
            return None
        return time.time() - status.st_mtime

    def version(self) -> str:
        """Another one for each list that there was."""
        status = os.stat(self.name, dir_fd=self._descriptor)
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    def read(self, name: str) -> U64:
        """A list.

        :raises StorageError: if there is none, or it is something else.
        """
        try:
            with self._open(name) as file:
                return hotlist.decode(file)
        except OSError as error:
            raise self._error(error, name) from error
        except ValueError as error:
            raise exception.StorageError(
                path=f"{self.path}/{name}", reason=str(error), code="no-list"
            ) from error

    def inode(self, name: str) -> int | None:
        """Another one for each file that has that name; None if there is none."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def save(self) -> None:
        """Keep the list under another name as well, if there is one.

        :raises StorageError: if that cannot be done.
        """
        if self.inode(self.name) is None:
            return
        self.link(self.name, self._saved)

    def recover(self) -> None:
        """Give a saved list its name again, if there is one; also what a killed agent has saved.

        :raises StorageError: if that cannot be done.
        """
        saved = self.inode(self._saved)
        if saved is None:
            return
        if saved == self.inode(self.name):
            # To rename a file to itself would leave both names
            self.remove(self._saved)
        else:
            with self._as_server(self._saved):
                self._rename(self._saved, self.name)

    def link(self, name: str, other: str) -> None:
        """Give a file one more name.

        :raises StorageError: if that cannot be done.
        """
        directory = self._descriptor
        with self._as_server(name):
            os.link(name, other, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)

    def check_room(self, pages: int) -> None:
        """Check that a list and its transfer leave room for the database.

        :raises StorageError: with code ``no-room`` if not.
        """
        status = os.fstatvfs(self._descriptor)
        free = status.f_bavail * status.f_frsize
        if free < 2 * pages * hotlist.MAX_LINE_BYTES + _RESERVE:
            raise exception.StorageError(
                path=self.path,
                reason=f"no list of hot pages is written with {free >> 20} MiB of room left",
                code="no-room",
            )

    def replace(
        self,
        name: str,
        pages: U64,
        cancelled: cancellation.Cancellation,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        """Put a list in the place of another, at a bounded rate.

        :param allowed: asked when all is written, whether it is still right to replace the list.
        :raises StorageError: if it cannot be written. The old one is as it was.
        :raises AgentError: if it is cancelled, or not allowed any more.
        """
        fresh = name + _NEW_SUFFIX
        try:
            with _acting_as(self._account):
                self._unlink(fresh)
                self._write(fresh, pages, cancelled)
            if not allowed():
                raise exception.AgentError(reason="the server is ending", code="ending")
            with _acting_as(self._account):
                self._rename(fresh, name)
            os.fsync(self._descriptor)
        except BaseException as error:
            with contextlib.suppress(OSError), _acting_as(self._account):
                self._unlink(fresh)
            if isinstance(error, OSError):
                raise self._error(error, name) from error
            raise

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        :raises StorageError: if that cannot be done.
        """
        with self._as_server(name):
            self._unlink(name)

    @contextlib.contextmanager
    def _as_server(self, name: str) -> Iterator[None]:
        try:
            with _acting_as(self._account):
                yield
        except OSError as error:
            raise self._error(error, name) from error

    def _write(self, name: str, pages: U64, cancelled: cancellation.Cancellation) -> None:
        descriptor = os.open(name, _FLAGS, _MODE, dir_fd=self._descriptor)
        with open(descriptor, "wb", buffering=0) as file:
            # Whatever the umask of the agent is
            os.fchmod(descriptor, _MODE)
            pause = 0.0
            for piece in hotlist.encode(pages):
                cancelled.wait(pause)
                _write_all(file.fileno(), piece)
                os.fdatasync(descriptor)
                pause = len(piece) / _BYTES_PER_SECOND
            os.fsync(descriptor)

    def _open(self, name: str) -> io.FileIO:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return io.FileIO(name, opener=lambda path, _: os.open(path, flags, dir_fd=self._descriptor))

    def _rename(self, name: str, other: str) -> None:
        os.rename(name, other, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def _error(self, error: OSError, name: str) -> exception.StorageError:
        reason = error.strerror or str(error)
        code = "unreadable"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = "no-room"
        elif error.errno in (errno.EACCES, errno.EPERM):
            code = "no-privilege"
            reason += " (the agent needs CAP_SETUID and CAP_SETGID to be the server's account)"
        elif error.errno == errno.ENOENT:
            code = "no-list"
        return exception.StorageError(
            path=name if name == self.path else f"{self.path}/{name}", reason=reason, code=code
        )


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _account_of(server: processes.ServerProcess) -> Account:
    """As which account the server opens files."""
    try:
        with open(f"/proc/{server.pid}/status", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        raise processes.process_error(server.pid, error) from error
    match = re.search(r"^Gid:(?:\s+\d+){3}\s+(\d+)", text, re.MULTILINE)
    if match is None:
        raise exception.ServerNotFound(reason=f"process {server.pid} has ended")
    return Account(server.uid, int(match[1]))


@contextlib.contextmanager
def _acting_as(account: Account) -> Iterator[None]:
    """Let the kernel take this thread for another account when it comes to files.

    :raises OSError: EPERM if we may not.
    """
    uid, gid = _libc.setfsuid(_NO_ID), _libc.setfsgid(_NO_ID)
    try:
        # The group first: afterwards the thread may not any more
        _libc.setfsgid(account.gid)
        _libc.setfsuid(account.uid)
        if (_libc.setfsuid(_NO_ID), _libc.setfsgid(_NO_ID)) != (account.uid, account.gid):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        yield
    finally:
        _libc.setfsuid(uid)
        _libc.setfsgid(gid)

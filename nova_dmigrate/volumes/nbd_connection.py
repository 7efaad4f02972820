# SPDX-License-Identifier: Apache-2.0
"""One connection to a server of NBD, for reading: what of the protocol a reader of volumes needs.

Fixed newstyle negotiation, ``NBD_OPT_GO``, simple replies. Structured replies are not asked for:
with them QEMU looks for holes at each read, and there is more to parse.

Specification: doc/proto.md of https://github.com/NetworkBlockDevice/nbd
"""

import contextlib
import errno
import os
import socket
import struct
from types import TracebackType

# Negotiation
_GREETING = struct.Struct(">8s8sH")
_INIT_MAGIC, _OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2
_OPTION = struct.Struct(">8sII")
_GO = 7
_ANSWER = struct.Struct(">QIII")
_ANSWER_MAGIC = 0x3E889045565A9
_ACK, _INFO = 1, 3
_ERROR_BIT = 1 << 31
_ERRORS = {
    _ERROR_BIT + 1: "the option is not supported",
    _ERROR_BIT + 2: "it does not allow it",
    _ERROR_BIT + 6: "it has no such export",
}
_EXPORT = struct.Struct(">HQH")
_INFO_EXPORT = 0
_MAX_ANSWER = 64 << 10

# Transmission
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_READ, _DISCONNECT = 0, 2
_REPLY = struct.Struct(">IIQ")
_REPLY_MAGIC = 0x67446698

#: The longest that servers take, QEMU's as well; longer reads are made as several ones.
_MAX_READ = 32 << 20


class ConnectionFailed(Exception):
    """The server has not answered in time, has gone, or has answered what it must not.

    The connection is of no use any more.
    """


class NoAnswer(ConnectionFailed):
    """The server has not answered in time."""


class NbdConnection:
    """One thread at a time uses it.

    :param address: path of the server's UNIX socket. :param export: the export's name.
    :param timeout: seconds that the server may take, to each answer and to each piece of data.
    :raises ConnectionFailed: there is no such export, no server, or no descriptor to be had.
    """

    def __init__(self, address: str, export: str, timeout: float) -> None:
        self._cookie = 0
        self._timeout = timeout
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # too many files are open
            raise self._failure(error) from error
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(address)
            self.size = self._negotiate(export.encode())
        except OSError as error:
            self._socket.close()
            raise self._failure(error) from error
        except BaseException:
            self._socket.close()
            raise

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer of bytes, of one dimension, from an offset in bytes.

        :returns: 0, or the number of the error for which the server has not read all of it.
        :raises ConnectionFailed: what of the buffer is filled is not known.
        """
        try:
            for start in range(0, buffer.nbytes, _MAX_READ):
                number = self._read_part(offset + start, buffer[start : start + _MAX_READ])
                if number:
                    return number
        except OSError as error:
            raise self._failure(error) from error
        return 0

    def close(self) -> None:
        """Part from the server, which is not waited for."""
        with self._socket:
            self._cookie += 1
            request = _REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, self._cookie, 0, 0)
            with contextlib.suppress(OSError):
                self._socket.send(request, socket.MSG_DONTWAIT)

    def __enter__(self) -> "NbdConnection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Negotiation

    def _negotiate(self, export: bytes) -> int:
        """Size of the export, in bytes."""
        magic, option, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option) != (_INIT_MAGIC, _OPTION_MAGIC) or not flags & _FIXED_NEWSTYLE:
            raise ConnectionFailed("it is no server of NBD that negotiates")
        name = struct.pack(">I", len(export)) + export
        wanted = struct.pack(">H", 0)
        self._socket.sendall(
            struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES))
            + _OPTION.pack(_OPTION_MAGIC, _GO, len(name) + len(wanted))
            + name
            + wanted
        )
        size = None
        while True:
            magic, option, kind, length = _ANSWER.unpack(self._receive(_ANSWER.size))
            if (magic, option) != (_ANSWER_MAGIC, _GO) or length > _MAX_ANSWER:
                raise ConnectionFailed("its answer to NBD_OPT_GO is not understood")
            data = self._receive(length)
            if kind & _ERROR_BIT:
                said = data.decode(errors="replace") or _ERRORS.get(kind, f"error {kind:#x}")
                raise ConnectionFailed(f"the server refuses to export: {said}")
            if kind == _INFO and data[:2] == struct.pack(">H", _INFO_EXPORT):
                if len(data) != _EXPORT.size:
                    raise ConnectionFailed("its answer to NBD_OPT_GO is not understood")
                _, size, _ = _EXPORT.unpack(data)
            elif kind == _ACK:
                break
        if size is None:
            raise ConnectionFailed("the server does not tell the size of the export")
        return int(size)

    # Reading

    def _read_part(self, offset: int, buffer: memoryview) -> int:
        self._cookie += 1
        self._socket.sendall(
            _REQUEST.pack(_REQUEST_MAGIC, 0, _READ, self._cookie, offset, buffer.nbytes)
        )
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if (magic, cookie) != (_REPLY_MAGIC, self._cookie):
            raise ConnectionFailed("its answer to a read is not understood")
        if not error:
            self._receive_into(buffer)
        return int(error)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, buffer: memoryview) -> None:
        while buffer:
            count = self._socket.recv_into(buffer)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            buffer = buffer[count:]

    def _failure(self, error: OSError) -> ConnectionFailed:
        if isinstance(error, TimeoutError):
            return NoAnswer(f"no answer for {self._timeout:g} seconds")
        return ConnectionFailed(error.strerror or str(error))

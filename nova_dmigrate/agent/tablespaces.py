# SPDX-License-Identifier: Apache-2.0
"""The tablespaces of a server: which file holds which pages, and which cannot be mapped.

Nothing is asked of the server. Its open files and its data directory show the files, and the
first page of each tells what it is: space id and flags are at the same place in all supported
servers, only the flags' meaning differs a little:

- bit 4 set: MariaDB's full_crc32 format. Bits 0..3 are the page size (log2 less 9), bits 5..7
  the algorithm of page compression.
- otherwise bits 1..4 are the size of compressed pages (ROW_FORMAT=COMPRESSED), 6..9 the page size
  (log2 less 9, or 0 for 16 KiB), 12 temporary and 13 encrypted (MySQL), 16 page-compressed
  (MariaDB).

MariaDB marks encryption in the first page behind the extent descriptors. MySQL's transparent page
compression leaves no mark in the flags; it shows as holes inside of pages (see ``mapper``).
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import posixpath
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Sequence

from nova_dmigrate.agent import processes

DEFAULT_PAGE_SIZE = 16384
MAX_PAGE_SIZE = 65536

_PAGE_NUMBER = struct.Struct(">I")
_TYPE_AND_SPACE = struct.Struct(">H8xI")  # at 24 and 34
_SPACE_HEADER = struct.Struct(">I12xI")  # space id at 38, flags at 54
_FSP_HEADER_TYPE = 8
_FULL_CRC32 = 1 << 4
_CRYPT_MAGIC = b"s\x0e\x0cREt"
_CRYPT_NONE = 0
_DESCRIPTORS = 150  # where the extent descriptors begin, behind which the mark is

# Files of the data directory that may be (parts of) tablespaces
_NAMES = re.compile(r".*\.(ibd|ibu|ibt|isl)|ibdata.*|ibtmp.*|undo_?\d+.*", re.IGNORECASE)
_TEMPORARY_NAMES = re.compile(r"ibtmp.*|.*\.ibt")
# Open files that may not: they hold copies of pages (doublewrite), or nothing of the kind
_OTHER_NAMES = re.compile(
    r".*\.dblwr|ib_logfile.*|ib_redo.*|#ib_redo.*|ib_buffer_pool.*|aria_log.*"
)
_TEMPORARY_IDS = (0xFFFFFFFE, 0xFFFFFFFD)
_MAX_DEPTH = 3
_SAMPLED_PAGES = 8

Unreadable = Callable[[str, OSError], None]  # the path as the server sees it

_Key = tuple[int, int]  # device and inode


@dataclasses.dataclass(frozen=True)
class Tablespace:
    """One file of a tablespace.

    ``path``: as the server sees it. ``location``: how to open it from here. ``pages``: in units
    of ``page_size`` bytes; they are the tablespace's pages from ``first_page`` on.
    ``excluded``: why no page of it equals its frame, as a stable word, or None.
    ``direct``: whether the server has it open with O_DIRECT; None when it is not open.
    """

    path: str
    location: str
    device: int
    inode: int
    space_id: int
    first_page: int
    pages: int
    page_size: int
    full_crc32: bool
    excluded: str | None
    direct: bool | None = None


@dataclasses.dataclass(frozen=True)
class FirstPage:
    """What the first page of a tablespace says."""

    space_id: int
    page_size: int
    full_crc32: bool
    excluded: str | None


def parse_first_page(page: bytes) -> FirstPage | None:
    """Decode the first page of a file, as much of it as is given; None if it is no such page."""
    if len(page) < 4096:
        return None
    (number,) = _PAGE_NUMBER.unpack_from(page, 4)
    kind, space = _TYPE_AND_SPACE.unpack_from(page, 24)
    again, flags = _SPACE_HEADER.unpack_from(page, 38)
    if number != 0 or kind != _FSP_HEADER_TYPE or space != again:
        return None
    if flags & _FULL_CRC32:
        shift = flags & 0xF
        excluded = "page-compressed" if flags >> 5 & 0x7 else None
        full_crc32 = True
    else:
        shift = flags >> 6 & 0xF or 5
        excluded = None
        if flags >> 1 & 0xF:
            excluded = "compressed"
        elif flags >> 12 & 1:
            excluded = "temporary"
        elif flags >> 13 & 1:
            excluded = "encrypted"
        elif flags >> 16 & 1:
            excluded = "page-compressed"
        full_crc32 = False
    if not 3 <= shift <= 7:
        return None
    if excluded != "temporary" and _is_encrypted(page):
        excluded = "encrypted"
    return FirstPage(space, 512 << shift, full_crc32, excluded)


def discover(server: processes.ServerProcess, unreadable: Unreadable) -> list[Tablespace]:
    """The tablespaces' files that can be found now, each once, sorted by space id and page.

    Files that come or go meanwhile are found or not.

    :param unreadable: called for each directory, or file that may be one of them, that is there
        and cannot be read.
    """
    found: dict[_Key, Tablespace] = {}
    parts: dict[_Key, _Candidate] = {}
    page_size = DEFAULT_PAGE_SIZE
    for candidate in _candidates(server, unreadable):
        if candidate.key in found or candidate.key in parts:
            continue
        try:
            space = _examine(candidate)
        except OSError as error:
            if error.errno != errno.ENOENT:
                unreadable(candidate.path, error)
            continue
        if space is None:
            parts[candidate.key] = candidate
        else:
            found[candidate.key] = space
            page_size = space.page_size
    # By length of the name first, so that ibdata10 continues what ibdata9 has continued.
    for candidate in sorted(parts.values(), key=lambda part: (len(part.path), part.path)):
        try:
            part = _continuation(candidate, page_size, found.values())
        except OSError:
            continue  # gone since it was examined
        part = part or _unwritten_temporary(candidate, page_size, found.values())
        if part is not None:
            found[candidate.key] = part
    return sorted(found.values(), key=lambda space: (space.space_id, space.first_page))


def common_page_size(spaces: Sequence[Tablespace]) -> int:
    """The server's page size, of which all its tablespaces are: that of most of them.

    A file that was forgotten in the data directory may have another.
    """
    sizes = collections.Counter(space.page_size for space in spaces)
    for space in spaces:
        if space.space_id == 0:
            return space.page_size
    return sizes.most_common(1)[0][0] if sizes else DEFAULT_PAGE_SIZE


def consistent(spaces: Sequence[Tablespace], page_size: int) -> Iterator[Tablespace]:
    """Those of that page size, each page once.

    Of a tablespace that is there twice (a copy left lying about) the file that the server has open
    comes first.
    """
    taken: dict[int, int] = {}
    for space in spaces:
        if space.page_size == page_size and space.first_page >= taken.get(space.space_id, 0):
            taken[space.space_id] = space.first_page + space.pages
            yield space


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A file that may be a tablespace's. ``key``: device and inode."""

    path: str
    location: str
    key: _Key
    size: int
    direct: bool | None


def _candidates(server: processes.ServerProcess, unreadable: Unreadable) -> Iterator[_Candidate]:
    """The server's open files first, which know about O_DIRECT, then those in its directories."""
    yield from _open_files(server)
    yield from _walk(server, server.datadir, 0, set(), unreadable)


def _open_files(server: processes.ServerProcess) -> Iterator[_Candidate]:
    directory = f"/proc/{server.pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise processes.process_error(server.pid, error) from error
    for name in names:
        location = f"{directory}/{name}"
        try:
            path = os.readlink(location)
            if not path.startswith("/") or path.endswith(" (deleted)"):
                continue
            if _OTHER_NAMES.fullmatch(posixpath.basename(path)):
                continue
            status = os.stat(location)
            if not stat.S_ISREG(status.st_mode):
                continue
            direct = _is_direct(f"/proc/{server.pid}/fdinfo/{name}")
        except FileNotFoundError:
            continue
        key = (status.st_dev, status.st_ino)
        yield _Candidate(server.inside(path), location, key, status.st_size, direct)


def _walk(
    server: processes.ServerProcess,
    path: str,
    depth: int,
    seen: set[_Key],
    unreadable: Unreadable,
) -> Iterator[_Candidate]:
    """The files below ``path`` (the server's) that by their names may be tablespaces.

    Links are followed: to data directories elsewhere, and those that ``.isl`` files name.
    """
    location = server.path(path)
    try:
        status = os.stat(location)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(location), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno != errno.ENOENT:
            unreadable(path, error)
        return
    for entry in entries:
        child = posixpath.join(path, entry.name)
        try:
            if entry.is_symlink():
                target = server.path(child)
                status = os.stat(target)
            elif entry.is_dir() or _NAMES.fullmatch(entry.name):
                target, status = entry.path, entry.stat()
            else:
                continue
            if stat.S_ISDIR(status.st_mode):
                if depth + 1 < _MAX_DEPTH:
                    yield from _walk(server, child, depth + 1, seen, unreadable)
                continue
            if not stat.S_ISREG(status.st_mode) or not _NAMES.fullmatch(entry.name):
                continue
            if entry.name.endswith(".isl"):
                with open(target, encoding="utf-8", errors="replace") as file:
                    child = file.read(4096).strip()
                target = server.path(child)
                status = os.stat(target)
        except OSError as error:
            if error.errno != errno.ENOENT:
                unreadable(child, error)
            continue
        yield _Candidate(child, target, (status.st_dev, status.st_ino), status.st_size, None)


def _examine(candidate: _Candidate) -> Tablespace | None:
    """What the first page says; None if that is not the first page of a tablespace."""
    first = parse_first_page(_read(candidate, 0, DEFAULT_PAGE_SIZE))
    if first is not None and first.page_size > DEFAULT_PAGE_SIZE:
        first = parse_first_page(_read(candidate, 0, first.page_size))
    if first is None:
        return None
    excluded = first.excluded
    if _TEMPORARY_NAMES.fullmatch(posixpath.basename(candidate.path)):
        excluded = "temporary"
    return _tablespace(candidate, first, 0, excluded)


def _continuation(
    candidate: _Candidate, page_size: int, known: Collection[Tablespace]
) -> Tablespace | None:
    """A file that continues another's tablespace (ibdata2), as its pages say themselves.

    All of its first pages that were ever written must agree, and continue what is known.
    """
    begins = set()
    content = _read(candidate, 0, _SAMPLED_PAGES * page_size)
    for index in range(len(content) // page_size):
        header = content[index * page_size : index * page_size + 38]
        (number,) = _PAGE_NUMBER.unpack_from(header, 4)
        _, space = _TYPE_AND_SPACE.unpack_from(header, 24)
        if any(header):
            begins.add((space, number - index))
    if len(begins) != 1:
        return None
    space, begin = begins.pop()
    same = [each for each in known if each.space_id == space and each.page_size == page_size]
    if not any(each.first_page + each.pages == begin for each in same):
        return None
    first = FirstPage(space, page_size, same[0].full_crc32, same[0].excluded)
    return _tablespace(candidate, first, begin, same[0].excluded)


def _unwritten_temporary(
    candidate: _Candidate, page_size: int, known: Collection[Tablespace]
) -> Tablespace | None:
    """The global temporary tablespace, whose first page may never be written.

    MariaDB gives it the space id that MySQL 8 gives its dictionary, MySQL 8 the one before it.
    """
    if not posixpath.basename(candidate.path).startswith("ibtmp"):
        return None
    taken = {space.space_id for space in known}
    space_id = _TEMPORARY_IDS[1 if _TEMPORARY_IDS[0] in taken else 0]
    if space_id in taken:
        return None
    return _tablespace(candidate, FirstPage(space_id, page_size, False, None), 0, "temporary")


def _tablespace(
    candidate: _Candidate, first: FirstPage, first_page: int, excluded: str | None
) -> Tablespace:
    return Tablespace(
        path=candidate.path,
        location=candidate.location,
        device=candidate.key[0],
        inode=candidate.key[1],
        space_id=first.space_id,
        first_page=first_page,
        pages=candidate.size // first.page_size,
        page_size=first.page_size,
        full_crc32=first.full_crc32,
        excluded=excluded,
        direct=candidate.direct,
    )


def _is_encrypted(page: bytes) -> bool:
    """Whether MariaDB's mark is in the first page, with a scheme that encrypts."""
    position = page.find(_CRYPT_MAGIC, _DESCRIPTORS)
    behind = position + len(_CRYPT_MAGIC)
    return position >= 0 and behind < len(page) and page[behind] != _CRYPT_NONE


def _is_direct(path: str) -> bool:
    with open(path, encoding="ascii") as file:
        match = re.search(r"^flags:\s*([0-7]+)", file.read(), re.MULTILINE)
    return match is not None and bool(int(match[1], 8) & os.O_DIRECT)


def _read(candidate: _Candidate, offset: int, length: int) -> bytes:
    """A piece of the file, shorter at its end."""
    descriptor = os.open(candidate.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)

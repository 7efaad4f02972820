# SPDX-License-Identifier: Apache-2.0
"""What the server itself takes for dirty, read from its descriptors of frames.

MySQL gives a frame the LSN of its last change only when it writes it, so a changed frame looks
like a clean one (see ``pages``). What is dirty it notes in a descriptor of each frame. These lie
in arrays, each before the frames of its chunk of the pool, and each descriptor has the address of
its frame, so an array shows itself: an address of a frame every so many bytes, each a page further
than the one before.

Where in a descriptor the two LSNs are differs between versions and builds. It is found out by
comparison: the newest change is the LSN of the frame, or 0 since the page was read, as long as the
oldest change that was not written is 0. Otherwise both are beyond the LSN of the frame. No other
two neighbouring words behave like that. Where none do, as with MariaDB, nothing is known from
here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import cancellation, memory, pages

LOG = logging.getLogger(__name__)

_WORD = 8
_STEP = 256 << 10  # an array that is shorter is not searched for: it is of less than 12 MiB
_PLACES = (4, 64)  # that are looked at in one go, where an array is likely, and elsewhere
_STRIDES = range(16, 129)  # sizes that a descriptor may have, in words
_CHAIN = 4
_CHECKED = 64  # descriptors inside of an array that have to fit, and at its end that may
# The work that a search is allowed, in units of which a processor does some 4000 in a millisecond:
# one for each page of its mappings, and so much for small ones. An array with its frames, of 16 MiB
# at least, needs less than it has pages; those of ordinary size need an eighth of that.
_ALLOWED = 1 << 20
_WORK_OF_PAGE = 2048  # to look for chains in one page
_WORK_OF_LOOK = 400  # to look at some descriptors, and one for so many words or pages of them
_ENTRIES_OF_WORK = 4
_BLOCK = 2048  # descriptors that are read in one go
_SAMPLES = (1024, 8192)  # descriptors that are looked at: the few mostly tell
_FEWEST_MARKED = 16  # frames with an LSN in their descriptors, for a choice that is no accident
_FEWEST_CLEAN = 0.05  # share of frames: what is beyond the LSN in all of them is something else
_MOST_AMISS = 0.05  # share of frames that got another page between two looks
_LOOK = 512  # frames that are looked at twice in one go
_MAX_LSN = np.uint64(1 << 46)  # beyond that are addresses

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class DescriptorArray:
    """The descriptors of ``count`` frames from address ``frames`` on.

    ``address``: of the word in the first of them that has the frame's address. ``stride``: bytes
    from one to the next.
    """

    address: int
    stride: int
    frames: int
    count: int


class Descriptors:
    """All of a server's descriptors, and which of their words says that a frame is dirty.

    ``oldest``: bytes from the word with the frame's address to that one.
    """

    def __init__(self, arrays: Sequence[DescriptorArray], oldest: int, page_size: int) -> None:
        self._arrays = arrays
        self._oldest = oldest
        self._page_size = page_size

    def dirty(self, process: memory.ProcessMemory, addresses: U64) -> Bools:
        """Which frames the server takes for dirty: addresses u64 (n,), ascending; bool (n,).

        A written page that is in none of its frames is a copy that waits to be written (MySQL 5.6
        keeps those of its doublewrite buffer). It is dirty, too: the next page takes its place.
        """
        dirty = np.zeros(addresses.size, np.bool_)
        if not addresses.size:
            return dirty
        outside = np.ones(addresses.size, np.bool_)
        low, high = int(addresses[0]), int(addresses[-1])
        for array in self._arrays:
            behind = array.frames + array.count * self._page_size
            if behind <= low or array.frames > high:
                continue
            first, last = np.searchsorted(addresses, np.array([array.frames, behind], np.uint64))
            outside[first:last] = False
            numbers = (addresses[first:last] - np.uint64(array.frames)) // np.uint64(
                self._page_size
            )
            for start in range(0, numbers.size, _BLOCK):
                part = numbers[start : start + _BLOCK].astype(np.int64)
                words = _read_words(process, array, part, self._oldest)
                dirty[first + start : first + start + part.size] = words != 0
        if outside.any():
            headers = pages.read_headers(process, addresses[outside], self._page_size)
            no_crc32 = np.zeros(headers.page.size, np.bool_)
            dirty[outside] = headers.has_lsn & headers.written(no_crc32)
        return dirty


def find(
    process: memory.ProcessMemory,
    mappings: Sequence[memory.Mapping],
    page_size: int,
    cancelled: cancellation.Cancellation,
) -> Descriptors | None:
    """The descriptors of a server's frames; None where they are not found or not understood.

    Nor are they where too much looks like an array: the search gives up.

    :raises AgentError: if it is cancelled.
    """
    pages_there = sum(mapping.size for mapping in mappings) // memory.PAGE_SIZE
    allowance = _Allowance(_ALLOWED + pages_there, cancelled)
    try:
        arrays = [
            array
            for mapping in mappings
            for array in _find_arrays(process, mapping, page_size, allowance)
        ]
    except _UsedUpError:
        LOG.warning("The search for the server's descriptors of frames was given up")
        return None
    for sample in _SAMPLES if arrays else ():
        oldest = _find_oldest(process, arrays, page_size, sample)
        if oldest is not None:
            return Descriptors(arrays, oldest, page_size)
    return None


class _UsedUpError(Exception):
    """The search has done all the work that it is allowed."""


class _Allowance:
    """The work that a search may still do, as long as it is not cancelled."""

    def __init__(self, left: int, cancelled: cancellation.Cancellation) -> None:
        self._left = left
        self._cancelled = cancelled

    def spend(self, work: int) -> None:
        self._cancelled.check()
        self._left -= work
        if self._left < 0:
            raise _UsedUpError


def _find_arrays(
    process: memory.ProcessMemory,
    mapping: memory.Mapping,
    page_size: int,
    allowance: _Allowance,
) -> Iterator[DescriptorArray]:
    cursor, places = mapping.start, _PLACES[0]
    while cursor < mapping.end:
        behind = min(mapping.end, cursor + places * _STEP)
        array = _find_first(process, mapping, cursor, behind, page_size, allowance)
        if array is None:
            cursor, places = behind, _PLACES[1]
        else:
            yield array
            # The next chunk of the pool begins where this one ends, more often than not
            cursor, places = array.frames + array.count * page_size, _PLACES[0]


def _find_first(
    process: memory.ProcessMemory,
    mapping: memory.Mapping,
    cursor: int,
    behind: int,
    page_size: int,
    allowance: _Allowance,
) -> DescriptorArray | None:
    """The first array that begins between two addresses."""
    allowance.spend(0)
    present = process.guest_pages(cursor, (behind - cursor) // memory.PAGE_SIZE) >= 0
    step = _STEP // memory.PAGE_SIZE
    chosen = np.flatnonzero(present[::step]) * _STEP + cursor
    lengths = np.full(chosen.size, memory.PAGE_SIZE, np.uint64)
    content, _ = process.read_pieces(chosen.astype(np.uint64), lengths)
    words = content.view(np.uint64).reshape(chosen.size, memory.PAGE_SIZE // _WORD)
    # Frames lie behind their descriptors
    inside = (words > chosen[:, np.newaxis].astype(np.uint64)) & (words < np.uint64(mapping.end))
    inside &= words % np.uint64(page_size) == 0
    for row in np.flatnonzero(np.count_nonzero(inside, axis=1) >= _CHAIN).tolist():
        allowance.spend(_WORK_OF_PAGE)
        for at, stride in _chains(words[row], inside[row], page_size):
            address = int(chosen[row]) + at * _WORD
            frame = int(words[row, at])
            array = _extend(process, mapping, address, frame, stride, page_size, allowance)
            if array is not None:
                return array
    return None


def _chains(words: U64, inside: Bools, page_size: int) -> list[tuple[int, int]]:
    """Where addresses of frames begin to follow each other: (word, bytes from one to the next)."""
    expected = words + np.uint64(page_size)
    found = []
    for stride in _STRIDES:
        # Where the word a stride further is that of the next frame, so often in a row
        follows = inside[:-stride] & (words[stride:] == expected[:-stride])
        chain = follows[: words.size - (_CHAIN - 1) * stride].copy()
        for number in range(1, _CHAIN - 1):
            chain &= follows[number * stride :][: chain.size]
        found += [(at, stride * _WORD) for at in np.flatnonzero(chain).tolist()]
    return sorted(found)


def _extend(
    process: memory.ProcessMemory,
    mapping: memory.Mapping,
    address: int,
    frame: int,
    stride: int,
    page_size: int,
    allowance: _Allowance,
) -> DescriptorArray | None:
    """The whole array of which one descriptor is known; None if it is something else."""

    def fit(numbers: NDArray[np.int64]) -> Bools:
        """Whether descriptors, counted from the known one, have the addresses of their frames."""
        at = address + numbers * stride
        if at.size:
            reach = abs(int(at[-1]) - int(at[0])) // memory.PAGE_SIZE + 1
            allowance.spend(_WORK_OF_LOOK + (at.size + reach) // _ENTRIES_OF_WORK)
        present = _present(process, at)
        lengths = np.full(at[present].size, _WORD, np.uint64)
        content, _ = process.read_pieces(at[present].astype(np.uint64), lengths)
        fitting = np.zeros(at.size, np.bool_)
        fitting[present] = content.view(np.int64) == (frame + numbers * page_size)[present]
        return fitting

    # They end where their frames begin, but for a few that would have found no room
    most = min((frame - address) // stride + 1, (mapping.end - frame) // page_size)
    # What is near is cheap to look at, and tells nearly all that is something else
    if not bool(fit(np.arange(min(most, _CHECKED))).all()):
        return None
    before = np.arange(-1, -min((address - mapping.start) // stride, _STEP // stride) - 1, -1)
    first = -_leading(fit(before))
    frames = frame + first * page_size
    most = min((frames - address) // stride + 1, most)
    inner = np.linspace(0, max(0, most - _CHECKED), _CHECKED).astype(np.int64)
    if frames <= address or not bool(fit(inner).all()):
        return None
    last = int(inner[-1])
    last += _leading(fit(np.arange(last + 1, most)))
    return DescriptorArray(address + first * stride, stride, frames, last - first + 1)


def _present(process: memory.ProcessMemory, addresses: NDArray[np.int64]) -> Bools:
    """Which words, int64 (n,), are in memory: to read others would put them there."""
    if not addresses.size:
        return np.zeros(0, np.bool_)
    numbers = addresses // memory.PAGE_SIZE
    first = int(numbers.min())
    guest = process.guest_pages(first * memory.PAGE_SIZE, int(numbers.max()) - first + 1)
    present: Bools = guest[numbers - first] >= 0
    return present


def _leading(fitting: Bools) -> int:
    """How many are true before the first that is not."""
    return int(fitting.argmin()) if not bool(fitting.all()) else fitting.size


def _find_oldest(
    process: memory.ProcessMemory,
    arrays: Sequence[DescriptorArray],
    page_size: int,
    sample: int,
) -> int | None:
    """Bytes from the word with the frame's address to that with the oldest change."""
    stride = arrays[0].stride
    alike = [array for array in arrays if array.stride == stride]
    every = max(1, sum(array.count for array in alike) // sample)
    # But for the first ones, of which the beginning may be outside
    numbers = [np.arange(1, each.count, every) for each in alike]
    address = np.concatenate(
        [
            each.address + (number - 1) * stride
            for each, number in zip(alike, numbers)  # noqa: B905 - Python 3.9
        ]
    ).astype(np.uint64)
    frame = np.concatenate(
        [
            each.frames + number * page_size
            for each, number in zip(alike, numbers)  # noqa: B905 - Python 3.9
        ]
    ).astype(np.uint64)
    words, lsn = [], []
    for start in range(0, frame.size, _LOOK):
        part = slice(start, start + _LOOK)
        # The descriptors first, and soon the frames: what is written in between is clean by both
        content, _ = process.read_pieces(
            address[part], np.full(address[part].size, stride, np.uint64)
        )
        headers = pages.read_headers(process, frame[part], page_size)
        used = headers.plausible & headers.written(np.zeros(frame[part].size, np.bool_))
        words.append(content.view(np.uint64).reshape(-1, stride // _WORD)[used])
        lsn.append(headers.lsn[used])
    return _choose(np.concatenate(words), np.concatenate(lsn), stride) if words else None


def _choose(words: U64, lsn: U64, stride: int) -> int | None:
    """Of the words before the frame's address (u64 (n, stride)) the one that fits best."""
    best, oldest = (-1, 0), None
    for number in range(1, words.shape[1]):
        new, old = words[:, number - 1], words[:, number]
        written = int(np.count_nonzero((old == 0) & (new == lsn)))
        unwritten = int(np.count_nonzero((old > lsn) & (new >= old) & (new < _MAX_LSN)))
        unchanged = int(np.count_nonzero((old == 0) & (new == 0)))
        between = int(np.count_nonzero((old != 0) & (new == lsn)))  # the two looks
        amiss = lsn.size - written - unwritten - unchanged - between
        if (
            amiss <= _MOST_AMISS * lsn.size
            and between <= written
            and written + unwritten >= _FEWEST_MARKED
            and written + unchanged >= _FEWEST_CLEAN * lsn.size
            and (written, unwritten) > best
        ):
            best, oldest = (written, unwritten), number * _WORD - stride
    return oldest


def _read_words(
    process: memory.ProcessMemory, array: DescriptorArray, numbers: NDArray[np.int64], offset: int
) -> U64:
    """One word of each descriptor of an array: numbers int64 (n,), ascending; u64 (n,)."""
    first, last = int(numbers[0]), int(numbers[-1])
    address = array.address + first * array.stride + offset
    length = (last - first) * array.stride + _WORD
    content, _ = process.read_pieces(np.array([address], np.uint64), np.array([length], np.uint64))
    picked: U64 = content.view(np.uint64)[(numbers - first) * (array.stride // _WORD)]
    return picked

# SPDX-License-Identifier: Apache-2.0
"""One map of many parts: a guest sends a large map in pieces, and those of each of its servers.

Parts that were made one after the other may contradict each other, because memory goes from one
use to another meanwhile. Such pages are left out: a miss costs time, a wrong page would cost more.

Nothing here expands runs to single pages, because one run of a hostile guest can be a terabyte of
them; and where parts overlap, they are compared a stretch of guest memory at a time, because that
takes ten times the memory of what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import volume

_HALF = np.uint64(32)
_MOST_RUNS = 1 << 20  # that are compared at a time


def join(parts: Sequence[tuple[volume.VolumeMap, ...]]) -> tuple[volume.VolumeMap, ...]:
    """The volume maps of all parts, each of which is valid, as one for each volume.

    Guest pages that several parts map alike are kept once, others that several parts map are left
    out. The volumes keep the order in which they appear first.

    :raises BufferMapError: if a volume has two sizes.
    """
    if len(parts) == 1:
        return parts[0]
    sizes: dict[str, int] = {}
    pieces: dict[str, list[volume.VolumeMap]] = {}
    for part in parts:
        for each in part:
            volume.note_size(sizes, each.volume_id, each.size)
            pieces.setdefault(each.volume_id, [])
            if each.page_count:
                pieces[each.volume_id].append(each)
    for same in pieces.values():
        same.sort(key=lambda each: int(each.guest_pages[0]))
    if all(_in_order(same) for same in pieces.values()):
        # The usual case: the memory of one server, mapped from low addresses to high ones
        built = tuple(_concatenated(name, sizes[name], same) for name, same in pieces.items())
        if not volume.overlapping(built):
            return built
        del built
    resolved: list[list[volume.VolumeMap]] = [[] for _ in sizes]
    every = [(number, each) for number, same in enumerate(pieces.values()) for each in same]
    for runs in _resolve(every, 0, volume.MAX_PAGES):
        for number, (name, size) in enumerate(sizes.items()):
            mine = runs.of_volume(number, name, size)
            if mine.page_count:
                resolved[number].append(mine)
    return tuple(
        _concatenated(name, size, same) for (name, size), same in zip(sizes.items(), resolved)
    )


def _in_order(pieces: Sequence[volume.VolumeMap]) -> bool:
    """Whether each piece ends before the next one begins."""
    return all(
        int(one.behind[-1]) <= int(other.guest_pages[0]) for one, other in zip(pieces, pieces[1:])
    )


def _concatenated(name: str, size: int, pieces: Sequence[volume.VolumeMap]) -> volume.VolumeMap:
    if len(pieces) == 1:
        return pieces[0]
    nothing = np.empty(0, np.uint32)
    lengths = None
    if any(each.lengths is not None for each in pieces):
        lengths = np.concatenate([_lengths(each) for each in pieces])
    return volume.VolumeMap.from_runs(
        name,
        size,
        np.concatenate([nothing, *(each.guest_pages for each in pieces)]),
        np.concatenate([nothing, *(each.volume_blocks for each in pieces)]),
        lengths,
    )


def _lengths(piece: volume.VolumeMap) -> volume.U32:
    if piece.lengths is None:
        return np.ones(piece.guest_pages.size, np.uint32)
    return piece.lengths


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs of any volumes: four u32 (n,).

    ``first``: guest page. ``behind``: guest page behind the last. ``distance``: from the guest
    page to its block, modulo 2**32. ``owner``: number of the volume. Runs map a guest page alike
    when they agree on the latter two.
    """

    first: volume.U32
    behind: volume.U32
    distance: volume.U32
    owner: volume.U32

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, volume.VolumeMap]], low: int, high: int) -> _Runs:
        """What the pieces, with the numbers of their volumes, map from ``low`` to below ``high``,
        within which each of their entries lies at least in part."""
        return cls.joined(
            [
                cls(
                    np.maximum(each.guest_pages, np.uint32(low)),
                    np.minimum(each.behind, np.uint32(high)),
                    each.volume_blocks - each.guest_pages,
                    np.full(each.guest_pages.size, number, np.uint32),
                )
                for number, each in pieces
            ]
        )

    @classmethod
    def joined(cls, several: Sequence[_Runs]) -> _Runs:
        return cls(
            *(
                np.concatenate([getattr(each, field.name) for each in several])
                for field in dataclasses.fields(cls)
            )
        )

    def take(self, which: NDArray[Any]) -> _Runs:
        return _Runs(self.first[which], self.behind[which], self.distance[which], self.owner[which])

    def sorted(self) -> _Runs:
        """By guest page. They are sorted in long stretches already, which the stable sort uses."""
        return self.take(np.argsort(self.first, kind="stable"))

    def of_volume(self, number: int, name: str, size: int) -> volume.VolumeMap:
        """The map of one volume; these runs are sorted and do not overlap."""
        mine = self.take(self.owner == number)
        return volume.VolumeMap.from_runs(
            name, size, mine.first, mine.first + mine.distance, mine.behind - mine.first
        )


def _resolve(
    pieces: Sequence[tuple[int, volume.VolumeMap]], low: int, high: int
) -> Iterator[_Runs]:
    """What the pieces, with the numbers of their volumes, map from ``low`` to below ``high``
    without contradiction, in ascending stretches."""
    pieces = [(number, _within(each, low, high)) for number, each in pieces]
    pieces = [(number, each) for number, each in pieces if each.guest_pages.size]
    if not pieces:
        return
    if sum(each.guest_pages.size for _, each in pieces) > _MOST_RUNS and high - low > 1:
        middle = (low + high) // 2
        yield from _resolve(pieces, low, middle)
        yield from _resolve(pieces, middle, high)
    else:
        yield _without_overlaps(_Runs.of(pieces, low, high))


def _within(piece: volume.VolumeMap, low: int, high: int) -> volume.VolumeMap:
    """The entries of which a part lies between two guest pages."""
    # No casting: a search for anything but u32 would copy the whole array
    edges = np.array([low, high], np.uint32)
    first = int(np.searchsorted(piece.guest_pages, edges[0], side="right"))
    last = int(np.searchsorted(piece.guest_pages, edges[1], side="left"))
    if first and (1 if piece.lengths is None else int(piece.lengths[first - 1])) > low - int(
        piece.guest_pages[first - 1]
    ):
        first -= 1
    return volume.VolumeMap(
        piece.volume_id,
        piece.size,
        piece.guest_pages[first:last],
        piece.volume_blocks[first:last],
        None if piece.lengths is None else piece.lengths[first:last],
    )


def _without_overlaps(runs: _Runs) -> _Runs:
    """Sorted, each guest page in one run at most: those in several that differ are left out."""
    runs = runs.sorted()
    reach = np.maximum.accumulate(runs.behind)
    tangled = np.zeros(runs.first.size, np.bool_)
    tangled[1:] = runs.first[1:] < reach[:-1]
    tangled[:-1] |= tangled[1:]
    resolved = _only_once(_united(runs.take(tangled)))
    return _Runs.joined([runs.take(~tangled), resolved]).sorted()


def _united(runs: _Runs) -> _Runs:
    """The same with runs that map pages alike united: those that overlap now contradict."""
    if not runs.first.size:
        return runs
    runs = runs.take(np.lexsort((runs.first, runs.distance, runs.owner)))
    same = (runs.owner[1:] == runs.owner[:-1]) & (runs.distance[1:] == runs.distance[:-1])
    group = np.zeros(runs.first.size, np.uint64)
    group[1:] = np.cumsum(~same)
    # How far the runs up to here reach; those of earlier groups count less than any of this one.
    reach = np.maximum.accumulate((group << _HALF) | runs.behind)
    begins = np.ones(runs.first.size, np.bool_)
    begins[1:] = ((group << _HALF) | runs.first)[1:] > reach[:-1]
    ends = np.append(begins[1:], True)
    return dataclasses.replace(runs.take(begins), behind=reach[ends].astype(np.uint32))


def _only_once(runs: _Runs) -> _Runs:
    """What of the runs no other run covers."""
    number = np.arange(runs.first.size, dtype=np.int64)
    at = np.concatenate([runs.first, runs.behind])
    order = np.argsort(at, kind="stable")
    at = at[order]
    # Behind each edge: how many runs cover that place, and the sum of their numbers, which is the
    # number of the run where it is one.
    count = np.cumsum(np.concatenate([np.ones_like(number), -np.ones_like(number)])[order])
    total = np.cumsum(np.concatenate([number, -number])[order])
    alone = np.zeros(at.size, np.bool_)
    alone[:-1] = (count[:-1] == 1) & (at[:-1] < at[1:])
    covered = np.flatnonzero(alone)
    kept = runs.take(total[covered])
    return dataclasses.replace(kept, first=at[covered], behind=at[covered + 1])

# SPDX-License-Identifier: Apache-2.0
"""Lists of hot pages, in the format in which MySQL and MariaDB dump and load their buffer pools.

A line for each page, ``space,page``. The servers load a list in the order of space and page, so
that the order of lines is free to tell more: the hottest comes first.

In memory a list is an array u64 (n,): space << 32 | page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_PAGES = 1 << 23  # 128 GiB of the usual pages
MAX_LINE_BYTES = 22

_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_STEP = 1 << 14  # lines that are written at a time
_PIECE_BYTES = 1 << 18
_LINES = re.compile(rb"(?:[0-9]{1,10},[0-9]{1,10}\n)*")

U64 = NDArray[np.uint64]


def encode(pages: U64) -> Iterator[bytes]:
    """The text of a list, in pieces of whole lines."""
    for start in range(0, pages.size, _STEP):
        part = pages[start : start + _STEP]
        pairs = zip((part >> _HALF).tolist(), (part & _LOW).tolist())  # noqa: B905 - Python 3.9
        yield b"".join(b"%d,%d\n" % pair for pair in pairs)


def decode(file: BinaryIO, limit: int = MAX_PAGES) -> U64:
    """The first ``limit`` pages of a list.

    :raises ValueError: if it is no such list.
    """
    found, count, rest = [np.empty(0, np.uint64)], 0, b""
    while count < limit:
        piece = file.read(_PIECE_BYTES)
        text = rest + piece
        # A last line need not be ended
        end = text.rfind(b"\n") + 1 if piece else len(text)
        lines, rest = text[:end], text[end:]
        if lines and not lines.endswith(b"\n"):
            lines += b"\n"
        if len(rest) > MAX_LINE_BYTES or not _LINES.fullmatch(lines):
            raise ValueError("it is no list of pages")
        if lines:
            numbers = np.fromstring(lines.replace(b"\n", b",")[:-1], np.uint64, sep=",")
            if bool((numbers > _LOW).any()):
                raise ValueError("it has numbers that are none of pages")
            found.append((numbers[::2] << _HALF) | numbers[1::2])
            count += found[-1].size
        if not piece:
            break
    return np.concatenate(found)[:limit]


def interleave(pages: U64, parts: int) -> U64:
    """One list of the lists of ``parts`` pool instances, which follow each other in a dump.

    A dump takes the same share of each, so they are of about one length.
    """
    length = max(1, -(-pages.size // max(1, parts)))
    ordered: U64 = pages[np.argsort(np.arange(pages.size) % length, kind="stable")]
    return ordered

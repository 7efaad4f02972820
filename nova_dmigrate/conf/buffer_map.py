# SPDX-License-Identifier: Apache-2.0
"""Limits of the buffer map, which comes from the guest and is not trusted."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "buffer_map",
    title="Buffer map options",
    help="""
Limits of the buffer map, which says which guest pages are copies of which
blocks of a volume. It comes from within the guest: a wrong one costs time,
and one beyond these limits is refused, upon which the guest migrates without
it.
""",
)

OPTIONS: list[cfg.Opt] = [
    cfg.IntOpt(
        "max_pages",
        default=67108864,
        min=1,
        max=4294967296,
        help="""
The most guest pages (4 KiB each) that one buffer map may hold. The default
maps 256 GiB.

A map takes up to 40 bytes of memory per page at either host.
""",
    ),
    cfg.IntOpt(
        "max_volumes",
        default=16,
        min=1,
        max=256,
        help="""
The most volumes that one buffer map may refer to.
""",
    ),
    cfg.IntOpt(
        "max_chunk_size",
        default=1024,
        min=64,
        max=8192,
        help="""
The largest chunk of a buffer map, in KiB, compressed or not, that is accepted.
Larger maps consist of several chunks.
""",
    ),
]

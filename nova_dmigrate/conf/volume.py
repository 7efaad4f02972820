# SPDX-License-Identifier: Apache-2.0
"""Options of reading volumes at the destination."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "volume",
    title="Volume options",
    help="""
How the destination relay reads the guest's volumes. It reads mapped blocks
only, in the order of the volume, and never writes.
""",
)

OPTIONS: list[cfg.Opt] = [
    cfg.IntOpt(
        "queue_depth",
        default=8,
        min=1,
        max=64,
        help="""
Number of reads of one volume that are under way at the same time.

Network storage and flash want several; a single disk is content with few.
""",
    ),
    cfg.IntOpt(
        "read_size",
        default=1024,
        min=16,
        max=8192,
        help="""
The largest single read of a volume, in KiB. Neighbouring blocks are merged up
to this size.
""",
    ),
    cfg.IntOpt(
        "merge_gap",
        default=64,
        min=0,
        max=4096,
        help="""
The largest gap between two wanted blocks, in KiB, that is read along and thrown
away, because one longer read is quicker than two.

0 merges only blocks that touch.
""",
    ),
    cfg.FloatOpt(
        "bandwidth",
        default=0,
        min=0,
        max=131072,
        help="""
The most that one migration reads from its volumes, in MiB/s. 0 means no cap.

Reads at the destination compete with the guest's own at the storage; a cap
protects the guest, and all others on that storage, from the migration.
""",
    ),
    cfg.IntOpt(
        "error_limit",
        default=64,
        min=1,
        max=1048576,
        help="""
Number of read errors of one volume after which it is read no more, and its
pages travel over the network.

Every single error already costs only the pages of that read; the limit keeps a
broken volume from costing its time-out again and again.
""",
    ),
    cfg.FloatOpt(
        "timeout",
        default=5,
        min=1,
        max=30,
        help="""
Seconds after which network storage (Ceph), or a qemu-storage-daemon that reads
an image, and has not answered, counts as failed: a read then is an error, and a
volume that is being opened is not read.
""",
    ),
    cfg.StrOpt(
        "rbd_user",
        default="",
        help="""
The Ceph client, without ``client.``, as which relays read RBD images. One of
their own needs no more than the capabilities ``mon 'profile rbd'`` and
``osd 'profile rbd-read-only'`` for the pools of the volumes.

Empty takes the client that the guest's QEMU uses, whose keyring has to be on this
host then.
""",
    ),
    cfg.StrOpt(
        "rbd_configuration",
        default="",
        help="""
Ceph's configuration file. Empty takes ``/etc/ceph/CLUSTER.conf``; where there is
none, the monitors that Nova knows of the volume are asked.
""",
    ),
    cfg.StrOpt(
        "rbd_keyring",
        default="",
        help="""
The keyring that the client's key is in. Empty leaves it to Ceph's configuration,
by default ``/etc/ceph/CLUSTER.client.NAME.keyring``.
""",
    ),
]

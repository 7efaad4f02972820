# SPDX-License-Identifier: Apache-2.0
"""Options of the two relays of a migration: buffers, pacing, time-outs, files."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "relay",
    title="Relay options",
    help="""
The two relays of a live migration. The source relay takes QEMU's migration
stream and sends references instead of the pages that the destination can read
from the volume; the destination relay reads them and gives QEMU an ordinary
stream.
""",
)

MEMORY = [
    cfg.IntOpt(
        "window_size",
        default=256,
        min=16,
        max=65536,
        help="""
Memory, in MiB, for the copies of pages that the source relay keeps while their
references are unresolved.

Besides, a relay takes memory for its program and the buffer map, see
``[host]/memory_limit``. When the window is full, mapped pages travel raw until
references have been resolved, so a small window costs time, never correctness.
""",
    ),
    cfg.IntOpt(
        "read_ahead",
        default=64,
        min=4,
        max=65536,
        help="""
Memory, in MiB, for what the destination relay has read from volumes and QEMU
has not taken yet.

Twice as much at most is taken where the wanted blocks are scattered. Besides, a
relay takes memory for its program and the buffer map, see
``[host]/memory_limit``. Much less than the volumes deliver in a tenth of a second
leaves them idle.
""",
    ),
    cfg.IntOpt(
        "batch_size",
        default=1024,
        min=256,
        max=4096,
        help="""
How much of the migration stream is handled at once, in KiB.

Large batches cost less CPU time per page, small ones less delay.
""",
    ),
]

PACING = [
    cfg.IntOpt(
        "channels",
        default=2,
        min=1,
        max=16,
        help="""
Number of TCP connections that carry pages from the source to the destination.

With TLS one connection keeps about one CPU core busy; more of them help on
networks of 10 Gbit/s and faster.
""",
    ),
    cfg.BoolOpt(
        "compression",
        default=True,
        help="""
Whether the source relay may compress what goes over the network (zstd).

It does so where the network would take longer for the bytes saved than the
processor for saving them: on slow or shared networks, as long as the host has
a processor to spare. Databases' pages compress to about a half.
""",
    ),
    cfg.IntOpt(
        "queue_delay",
        default=10,
        min=1,
        max=1000,
        help="""
How many milliseconds' worth of bytes may wait at the source for the network.

QEMU derives from the pace at which its stream is taken how long the guest
would have to pause for the switchover. Much buffered here would let QEMU
believe in a bandwidth that does not exist, and lengthen the downtime.
""",
    ),
    cfg.IntOpt(
        "hurry_threshold",
        default=250,
        min=0,
        max=60000,
        help="""
When the volume still needs longer than this many milliseconds for the
references that wait for it, and the network has nothing to carry, the source
relay sends waiting references as copies.

0 lets an idle network help at once.
""",
    ),
    cfg.IntOpt(
        "hold_pages",
        default=24576,
        min=0,
        max=16777216,
        help="""
The number of guest pages (4 KiB each) at the end of the bulk before which the
source relay waits until all references are resolved.

No reference may be open when QEMU decides about the switchover: the guest
would pause while the volume is being read. 0 waits at the end of guest memory
only.
""",
    ),
    cfg.FloatOpt(
        "network_bandwidth",
        default=0,
        min=0,
        max=131072,
        help="""
The most that one migration sends over the network, in MiB/s. 0 means no cap.

It counts what goes over the wire. Without it QEMU's own cap (Nova's
``[libvirt]/live_migration_bandwidth``) limits guest memory, from whichever
side it comes.
""",
    ),
]

TIMEOUTS = [
    cfg.IntOpt(
        "connect_timeout",
        default=10,
        min=1,
        max=600,
        help="""
Seconds within which a relay must have reached the other one, and QEMU.

Nothing is lost when it passes: the migration fails before any page was sent,
and the guest goes on at the source.
""",
    ),
    cfg.IntOpt(
        "stall_timeout",
        default=30,
        min=2,
        max=600,
        help="""
Seconds of silence of the other relay after which a relay gives the migration
up. The guest goes on at the source.

Relays that have nothing to say send each other keepalives, so only a broken
network or a dead process is silent. Whoever migrates aborts what stands still
for longer.
""",
    ),
    cfg.IntOpt(
        "idle_timeout",
        default=900,
        min=1,
        max=86400,
        help="""
Seconds for which a relay waits for QEMU's stream before it ends by itself.

Usually whoever has started a relay ends it, and if not, the host service does.
This is for relays that nobody knows any more. It has to be longer than
``[migration]prepare_time`` and ``map_time`` together.
""",
    ),
]

FILES = [
    cfg.StrOpt(
        "summary_directory",
        default="/var/lib/nova-dmigrate/summaries",
        help="""
Directory in which each relay writes the summary of its migration, a JSON file:
bytes by kind, references and misses by reason, time by stage, throughput over
time.
""",
    ),
    cfg.StrOpt(
        "runtime_directory",
        default="/run/nova-dmigrate",
        help="""
Directory for the sockets of running relays: the one that QEMU connects to, and
the one that tells a relay's progress.

Only the user that the relays run as, and QEMU's, may have access to it. A
relay removes its sockets when it ends.
""",
    ),
]

OPTIONS: list[cfg.Opt] = [*MEMORY, *PACING, *TIMEOUTS, *FILES]

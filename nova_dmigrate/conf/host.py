# SPDX-License-Identifier: Apache-2.0
"""Options of the service that runs a host's relays."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "host",
    title="Host service options",
    help="""
The host service, one on each compute host, starts the relays of the migrations
that leave and reach this host, when whoever migrates asks for them over the
message broker (``[DEFAULT]/transport_url``).
""",
)

IDENTITY = [
    cfg.StrOpt(
        "name",
        default="",
        help="""
Name of this host, by which others ask its service. With TLS it must be in this
host's certificate. Empty takes the operating system's host name.
""",
    ),
]

LIMITS = [
    cfg.IntOpt(
        "max_relays",
        default=4,
        min=1,
        max=1024,
        help="""
How many migrations may leave this host through relays at the same time, and how
many may reach it. Further ones wait in a queue.

Both directions are counted apart, so that two hosts that migrate to each other
never wait for each other.
""",
    ),
    cfg.IntOpt(
        "memory_limit",
        default=0,
        min=0,
        max=1048576,
        help="""
Memory, in MiB, that all relays of this host may take together; further ones
wait in the queue. 0 means no limit.

A relay counts with 128 MiB, its buffers (``[relay]/window_size`` at the source,
twice ``[relay]/read_ahead`` at the destination), and for the buffer map 40 bytes
for each 4 KiB of its guest's memory, which is a hundredth of that;
``[buffer_map]/max_pages`` bounds it. Room for a source relay, of a guest as large
as those that come, is always left free of destination relays. A guest for which
there is never room migrates in the ordinary way.
""",
    ),
    cfg.FloatOpt(
        "network_bandwidth",
        default=0,
        min=0,
        max=131072,
        help="""
The most that all relays of this host send over the network together, in MiB/s.
0 means no cap.

Running relays have equal shares. What one cannot use, because its own cap is
lower, goes to the others; the shares change when a relay starts or ends.
""",
    ),
    cfg.FloatOpt(
        "volume_bandwidth",
        default=0,
        min=0,
        max=131072,
        help="""
The most that all relays of this host read from volumes together, in MiB/s. 0
means no cap. Shared as ``network_bandwidth`` is.
""",
    ),
    cfg.FloatOpt(
        "queue_timeout",
        default=300,
        min=0,
        max=3600,
        help="""
Seconds that a relay waits in the queue at most, even if whoever asked for it
would wait longer.
""",
    ),
    cfg.FloatOpt(
        "max_lease",
        default=60,
        min=1,
        max=3600,
        help="""
Seconds after which a relay is ended, and what belongs to it removed, when
nobody has asked for it, even if whoever started it wanted to ask less often.
""",
    ),
    cfg.FloatOpt(
        "drain_timeout",
        default=30,
        min=0,
        max=3600,
        help="""
Seconds for which the service, when it is told to stop, waits for running
migrations, while it takes no new ones.

Relays that still run then go on without it, and its successor takes them over.
""",
    ),
]

PERMISSIONS = [
    cfg.ListOpt(
        "volume_directories",
        default=["/dev/*", "/dev/*/*", "/dev/disk/*/*", "/var/lib/nova", "/var/lib/libvirt/images"],
        help="""
Where volumes may lie that relays read: directories for files, and paths of block
devices, in which ``*`` stands for any text but ``/``, as in
``/dev/mapper/vg-volume*``.

A relay reads only the volumes of its instance in any case, for which the source's
host vouches (``libvirt_uri``); this list holds even if that is wrong. The default
allows all block devices, and files where Nova and libvirt have them: name the
devices of volumes where they can be told from the host's own. Empty allows
whatever the relays may open.
""",
    ),
    cfg.StrOpt(
        "libvirt_uri",
        default="qemu:///system",
        help="""
The libvirt of this host. The service asks it for the disks of a guest that
leaves: volumes that are none of them are not read at the destination; and for
the downtime of one that has come. Its version and QEMU's are told to other
hosts.

Empty asks nothing: whoever migrates is believed. That is for hosts whose
guests are not libvirt's.
""",
    ),
    cfg.ListOpt(
        "rbd_images",
        default=["*/volume-*"],
        help="""
Which RBD images relays read: ``POOL/IMAGE``, or ``POOL/NAMESPACE/IMAGE``, in
which ``*`` stands for any text but ``/``.

Name the pools of your volumes, as in ``volumes/volume-*``. Empty allows whatever
the Ceph client may read (``[volume]rbd_user``).
""",
    ),
    cfg.ListOpt(
        "iscsi_units",
        default=[],
        help="""
Which units of iSCSI targets relays read by QEMU's own initiator, for disks that
libvirt has so: URLs as ``iscsi://10.0.0.5:3260/iqn.2010-10.org.openstack:*/1``, in
which ``*`` stands for any text but ``/``. Those that the host has connected itself
are block devices, and not meant.

Empty allows none.
""",
    ),
    cfg.BoolOpt(
        "volume_keys",
        default=False,
        help="""
Whether relays of this host are given the passphrases of volumes that QEMU
encrypts (LUKS), as this host's libvirt has them for its guests: secrets for the
use ``volume``. The service and its relays have to be allowed to ask for them at
``libvirt_uri``.

Without it the pages of encrypted volumes travel over the network.
""",
    ),
    cfg.ListOpt(
        "map_directories",
        default=[],
        help="""
Directories below which the buffer maps and memory layouts lie that relays
read. Into maps that lie in one of them itself the service puts what comes over
guests' ports.
Empty stands for ``maps`` in ``state_directory``, where whoever migrates with
this configuration has them.
""",
    ),
    cfg.ListOpt(
        "channel_directories",
        default=["/var/lib/libvirt/qemu/channel", "/run/libvirt/qemu/channel"],
        help="""
Directories below which the sockets of virtio-serial ports lie over which agents
may be asked on behalf of other hosts.
""",
    ),
    cfg.StrOpt(
        "qemu_user",
        default="",
        help="""
User that the sockets for QEMU, and the directory of each migration's socket, are
given to, by name or number.

Empty looks for it: ``user`` in ``/etc/libvirt/qemu.conf``, else an account named
``libvirt-qemu`` or ``qemu``, else root. It has to be the one that QEMU runs as:
where it is not, migrations are ordinary ones.
""",
    ),
    cfg.StrOpt(
        "qemu_group",
        default="",
        help="""
Group that these are given to, by name or number. Empty takes libvirt's ``group``
where the user is libvirt's, else that user's own.
""",
    ),
]

FILES = [
    cfg.StrOpt(
        "state_directory",
        default="/var/lib/nova-dmigrate",
        help="""
Directory in which the service notes what it has started, so that its successor
knows, and where summaries of migrations are kept.
""",
    ),
    cfg.StrOpt(
        "socket_directory",
        default="/run/nova-dmigrate",
        help="""
Directory of the sockets for QEMU. It should be the same on all hosts, because
libvirt has source and destination use the same path.
""",
    ),
    cfg.IntOpt(
        "summary_days",
        default=30,
        min=1,
        max=36500,
        help="""
Days for which summaries of migrations are kept.
""",
    ),
    cfg.IntOpt(
        "summary_count",
        default=1000,
        min=0,
        max=1000000,
        help="""
How many summaries of migrations are kept at most, the newest ones. 0 means no
limit but that of ``summary_days``.
""",
    ),
]

METRICS = [
    cfg.HostAddressOpt(
        "metrics_address",
        default="127.0.0.1",
        help="""
Address at which the service tells Prometheus what goes on. Whoever reaches it
may read that.
""",
    ),
    cfg.PortOpt(
        "metrics_port",
        default=0,
        help="""
TCP port for that, with the path ``/metrics``. 0 tells nothing.
""",
    ),
]

OPTIONS: list[cfg.Opt] = [*IDENTITY, *LIMITS, *PERMISSIONS, *FILES, *METRICS]

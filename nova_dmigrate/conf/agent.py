# SPDX-License-Identifier: Apache-2.0
"""Options of the agent in the guest."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "agent",
    title="Agent options",
    help="""
The agent runs in the guest, beside the database server. It tells the hosts
which pages of the guest's memory are copies of which blocks of its volumes, and
has the server write dirty pages before a migration. These options are read in
the guest alone.
""",
)

REQUESTS = [
    cfg.StrOpt(
        "instance",
        default="",
        help="""
UUID of this instance. Empty takes it from the firmware's tables (DMI), where
Nova puts it.
""",
    ),
    cfg.StrOpt(
        "transport",
        default="broker",
        choices=[
            ("broker", "The message broker of ``[DEFAULT]/transport_url``"),
            ("channel", "A virtio-serial port, for guests that must not reach the broker"),
        ],
        help="""
How requests of the hosts arrive.

With ``broker``, ``[DEFAULT]/transport_url`` must name this instance's own
virtual host and user, see the security chapter of the administration guide.
""",
    ),
    cfg.StrOpt(
        "channel_path",
        default="/dev/virtio-ports/org.openstack.dmigrate.0",
        help="""
The port for requests. Used only with ``transport = channel``.
""",
    ),
    cfg.StrOpt(
        "state_directory",
        default="/var/lib/nova-dmigrate-agent",
        help="""
Directory in which the agent notes what it has changed in a server, so that it
is put back even after the agent was killed, and keeps the map that is being
fetched (for 64 GiB of buffer pool some 100 MB).
""",
    ),
]

SERVERS = [
    cfg.StrOpt(
        "datadir",
        default="",
        help="""
Data directory of the database server that is meant. Empty, with ``socket``
empty as well, means every MySQL and MariaDB server of the guest.
""",
    ),
    cfg.StrOpt(
        "socket",
        default="",
        help="""
Socket of the database server that is meant. Empty means any.
""",
    ),
    cfg.ListOpt(
        "server_users",
        default=["mysql"],
        help="""
Accounts that run database servers, by name or number as this guest sees them. A
process that runs as another is never taken for a server, whatever it calls
itself, and never gets the password of ``sql_user``.

For a server in a container this is mostly a number: what ``ps -o uid`` shows
outside of it (999 for the common images, another one with user namespaces).
Name no account under which others than database servers run.
""",
    ),
    cfg.StrOpt(
        "sql_user",
        default="nova_dmigrate",
        help="""
The SQL user as which the agent asks for flushing. ``nova-dmigrate-agent
grants`` tells how to make it with the fewest privileges.
""",
    ),
    cfg.StrOpt(
        "sql_password_file",
        default="",
        help="""
File that holds the password of ``sql_user``, readable for the agent alone.
Empty for none, when the server knows the user by the account that connects.
""",
    ),
    cfg.FloatOpt(
        "sql_timeout",
        default=5,
        min=0.5,
        max=60,
        help="""
Seconds within which the server must answer a statement.
""",
    ),
    cfg.DictOpt(
        "volume_names",
        default={},
        help="""
Names of disks whose serial does not tell the volume: kernel name of the disk
and the volume's id, e.g. ``vdb:4dc3...``.
""",
    ),
]

MAPPING = [
    cfg.FloatOpt(
        "map_cpu_share",
        default=0.02,
        min=0.001,
        max=1,
        help="""
Share of all of the guest's processors that the search through the server's
memory takes at least, when others leave less.

While processors are idle it goes as fast as it can; when none are, it takes
four fifths of what others leave. 1 never holds it back.
""",
    ),
    cfg.FloatOpt(
        "map_time_limit",
        default=5,
        min=0,
        max=600,
        help="""
Seconds for which that may draw out the search. A map that comes too late is of
no use to a migration, so a guest that is always busy is not spared for longer.
""",
    ),
]

PREPARATION = [
    cfg.IntOpt(
        "max_flush_rate",
        default=200,
        min=1,
        max=65536,
        help="""
The most, in MiB/s, that a server is asked to write in order to have fewer dirty
pages before a migration.

A server whose own settings (``innodb_io_capacity``) allow more keeps those.
""",
    ),
    cfg.FloatOpt(
        "max_lease",
        default=600,
        min=1,
        max=3600,
        help="""
Seconds after which changed settings are put back at the latest when a host does
not ask again.
""",
    ),
    cfg.FloatOpt(
        "max_preparation",
        default=7200,
        min=1,
        max=86400,
        help="""
Seconds after which changed settings are put back at the latest, however often a
host asks again.
""",
    ),
]

HOT_PAGES = [
    cfg.FloatOpt(
        "hot_list_interval",
        default=300,
        min=0,
        max=86400,
        help="""
Seconds after which the list of hot pages beside a server's data is replaced by
a new one. 0 keeps none.

The list is the file that the server itself loads at its start
(``innodb_buffer_pool_filename``). After an evacuation the buffer pool is filled
from it, hottest pages first.
""",
    ),
    cfg.FloatOpt(
        "hot_list_share",
        default=0.9,
        min=0.01,
        max=1,
        help="""
The most, as a share of the buffer pool, that is on the list. A page takes some
12 bytes, so that the list of 64 GiB has 45 MB. A list has 8 388 608 pages at
most, 128 GiB of the usual size.
""",
    ),
    cfg.IntOpt(
        "warm_up_rate",
        default=100,
        min=1,
        max=65536,
        help="""
The most, in MiB/s, that a server is asked to read when its buffer pool is
filled after an evacuation.
""",
    ),
]

OPTIONS: list[cfg.Opt] = [*REQUESTS, *SERVERS, *MAPPING, *PREPARATION, *HOT_PAGES]

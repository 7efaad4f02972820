# SPDX-License-Identifier: Apache-2.0
"""Options of the orchestration of migrations."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "migration",
    title="Migration options",
    help="""
How a migration is carried out: what the database is asked for before, what the
hosts wait for, and when the ordinary migration is the better one. Read on the
source host, by whatever starts the migration.
""",
)

AGENT = [
    cfg.StrOpt(
        "agent_transport",
        default="channel",
        choices=[
            ("channel", "The virtio-serial port of the guest"),
            ("broker", "The message broker, see ``agent_url``"),
        ],
        help="""
How ``nova-dmigrate migrate`` asks agents in guests. Nova's driver takes the
port where a domain has one, and ``agent_url`` otherwise.
""",
    ),
    cfg.StrOpt(
        "agent_url",
        default="",
        secret=True,
        help="""
Transport URL of the broker for agents, without a virtual host: each instance
has its own, named ``dmigrate-UUID``. Nova's driver asks no agent without it,
unless a domain has the port.
""",
    ),
    cfg.FloatOpt(
        "agent_timeout",
        default=5,
        min=0.5,
        max=60,
        help="""
Seconds within which an agent must answer. A guest whose agent does not answer
migrates in the ordinary way.
""",
    ),
    cfg.FloatOpt(
        "prepare_time",
        default=0,
        min=0,
        max=600,
        help="""
Seconds, at most, that the database gets to write dirty pages before its memory
is mapped. What is dirty then goes over the network.

0 leaves the database alone, and the agent needs no account there. The stream
begins meanwhile in any case, so that other seconds pay only where the database
writes its pages faster than the migration network carries them.
""",
    ),
    cfg.FloatOpt(
        "dirty_share",
        default=0.01,
        min=0,
        max=1,
        help="""
Share of dirty pages in the buffer pool at which a migration goes on at once.
""",
    ),
    cfg.FloatOpt(
        "map_time",
        default=120,
        min=1,
        max=3600,
        help="""
Seconds, at most, for building the buffer map, again for fetching it, and once
more for the source relay to load it where relays are required.
""",
    ),
    cfg.FloatOpt(
        "min_mapped_share",
        default=0.05,
        min=0,
        max=1,
        help="""
Share of the guest's memory that the buffer map must hold. With less, the
ordinary migration is as quick.
""",
    ),
]

HOSTS = [
    cfg.FloatOpt(
        "host_timeout",
        default=2,
        min=0.1,
        max=60,
        help="""
Seconds within which the services of both hosts must answer.
""",
    ),
    cfg.FloatOpt(
        "queue_time",
        default=60,
        min=0,
        max=3600,
        help="""
Seconds for which a migration waits for its turn when a host runs as many relays
as it may.
""",
    ),
    cfg.FloatOpt(
        "lease",
        default=30,
        min=5,
        max=600,
        help="""
Seconds after which relays and settings of the database are given up when the
process that carries out a migration is gone.
""",
    ),
]

LIBVIRT = [
    cfg.IntOpt(
        "max_downtime",
        default=0,
        min=0,
        max=600000,
        help="""
Milliseconds that the guest may pause at the switchover, as QEMU reckons it. 0
keeps what libvirt has for the domain.
""",
    ),
    cfg.BoolOpt(
        "retry_ordinary",
        default=True,
        help="""
Migrate once more, in the ordinary way, when a relay failed before the
switchover.
""",
    ),
    cfg.StrOpt(
        "history_directory",
        default="/var/lib/nova-dmigrate/history",
        help="""
Where the summary of each migration is kept.
""",
    ),
    cfg.IntOpt(
        "history_days",
        default=365,
        min=0,
        max=36500,
        help="""
Days for which it is kept there. 0 keeps it for ever. What is older is removed
when a migration is added.
""",
    ),
    cfg.IntOpt(
        "history_count",
        default=1000,
        min=0,
        max=1000000,
        help="""
How many summaries are kept there at most, the newest ones. 0 means no limit.
""",
    ),
]

OPTIONS: list[cfg.Opt] = [*AGENT, *HOSTS, *LIBVIRT]

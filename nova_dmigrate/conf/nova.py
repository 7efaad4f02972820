# SPDX-License-Identifier: Apache-2.0
"""Options of the Nova driver. They stand in nova.conf, and are the only ones of ours there."""

from __future__ import annotations

from oslo_config import cfg

DEFAULT_FILE = "/etc/nova-dmigrate/nova-dmigrate.conf"

GROUP = cfg.OptGroup(
    "dmigrate",
    title="Nova driver options",
    help="""
For nova.conf of compute hosts with ``[DEFAULT]/compute_driver =
dmigrate.DMigrateDriver``: which servers' live migrations use nova-dmigrate. How
they do is said in files of nova-dmigrate's own (``config_file``).
""",
)

OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "default_policy",
        default="disabled",
        choices=[
            ("disabled", "Live migrations are Nova's own"),
            ("preferred", "They use nova-dmigrate where that is possible"),
            ("required", "They use nova-dmigrate, or do not take place"),
        ],
        help="""
Policy of servers of which neither flavor (``dmigrate:policy``), nor image
(``dmigrate_policy``), nor metadata say one.
""",
    ),
    cfg.BoolOpt(
        "policy_from_metadata",
        default=False,
        help="""
Whether the metadata of a server (``dmigrate_policy``) count, which its owner can
change at any time. What flavor or image say comes first.

An owner who may say ``required`` can keep a server from being migrated by
having no agent in it.
""",
    ),
    cfg.ListOpt(
        "config_file",
        default=[DEFAULT_FILE],
        help="""
nova-dmigrate's own configuration, the files that the host service has too. Read
at the first live migration that shall use it. Of them nova-compute uses the
groups ``migration``, ``host`` and ``buffer_map``, and the broker's URL; if that is
empty, Nova's own ``[DEFAULT]/transport_url`` is taken. Where a file has a
directory beside it, of its name with ``.d``, the files in that are read as well.

The default may be missing, others may not.
""",
    ),
]

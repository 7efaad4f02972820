# SPDX-License-Identifier: Apache-2.0
"""The options of nova-dmigrate, one module per group.

There is no global configuration object here: an entry point in ``cmd/`` makes its own, has the
options registered on it, and hands plain settings to the layers below, which know nothing of
oslo.config.
"""

import copy

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.conf import agent, buffer_map, host, migration, relay, volume, wire

GROUPS = (relay, volume, wire, buffer_map, host, agent, migration)


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register all groups and their options on ``conf``."""
    for module in GROUPS:
        # oslo.config keeps values in the group: two configurations must not share one
        group = copy.deepcopy(module.GROUP)
        conf.register_group(group)
        conf.register_opts(module.OPTIONS, group=group.name)


def check(conf: cfg.ConfigOpts) -> None:
    """Read every option: oslo.config checks a value no earlier.

    :raises ConfigurationError: a value cannot be.
    """
    for module in GROUPS:
        for option in module.OPTIONS:
            try:
                getattr(conf[module.GROUP.name], option.dest)
            except (cfg.Error, ValueError) as error:
                raise exception.ConfigurationError(
                    reason=f"[{module.GROUP.name}]{option.dest}: {error}"
                ) from error


__all__ = ["GROUPS", "check", "register_opts"]

# SPDX-License-Identifier: Apache-2.0
"""The two configurations: ``[dmigrate]`` in Nova's, and nova-dmigrate's own.

They are kept apart, because a group ``host`` in Nova's would hide Nova's option of that name.
"""

import copy
import os

from oslo_config import cfg

from nova_dmigrate import conf, exception
from nova_dmigrate.conf import nova as options
from nova_dmigrate.rpc import broker

#: What ``[DEFAULT]/compute_driver`` of nova.conf has to be.
COMPUTE_DRIVER = "dmigrate.DMigrateDriver"
#: Releases of Nova that the driver is for: from the first on; the last is the newest one tried.
OLDEST_NOVA, NEWEST_NOVA = 32, 34


def register(nova: cfg.ConfigOpts) -> None:
    """Have ``[dmigrate]`` in Nova's configuration."""
    # oslo.config keeps values in the group: two configurations must not share one
    nova.register_group(copy.deepcopy(options.GROUP))
    nova.register_opts(options.OPTIONS, group=options.GROUP.name)


def directories(nova: cfg.ConfigOpts) -> list[str]:
    """With more files of ours, read after the others, as all who have these files by default do.

    :param nova: Nova's, with ``[dmigrate]``.
    """
    beside = (f"{path}.d" for path in nova.dmigrate.config_file)
    return [path for path in beside if os.path.isdir(path)]


def load(nova: cfg.ConfigOpts) -> cfg.ConfigOpts:
    """nova-dmigrate's own configuration.

    :param nova: Nova's, with ``[dmigrate]``.
    :raises ConfigurationError: it cannot be read, or says what cannot be.
    """
    files = [
        path
        for path in nova.dmigrate.config_file
        if path != options.DEFAULT_FILE or os.path.exists(path)
    ]
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    broker.set_defaults(config)
    try:
        config(
            [],
            project="nova-dmigrate",
            default_config_files=files,
            default_config_dirs=directories(nova),
        )
    except (cfg.Error, ValueError) as error:
        raise exception.ConfigurationError(reason=str(error)) from error
    conf.check(config)
    said = config.get_location("transport_url")
    if said is None or not said.location.is_user_controlled or not config.transport_url:
        config.set_override("transport_url", nova.transport_url)
    return config

# SPDX-License-Identifier: Apache-2.0
"""What hosts are configured to: the product's own options, with their defaults or others."""

from __future__ import annotations

from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.cmd import host
from nova_dmigrate.host.capacity import Limits
from nova_dmigrate.migration import peers
from nova_dmigrate.migration.settings import OrchestrationSettings


def product_limits(**options: object) -> Limits:
    """Of a host's relays; ``options``: "group__name"."""
    return host.limits_from(_configured(options))


def product_settings(**options: object) -> OrchestrationSettings:
    """Of who migrates from there."""
    return peers.settings_from(_configured(options))


def _configured(options: dict[str, object]) -> cfg.ConfigOpts:
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    config([], project="nova-dmigrate", default_config_files=[], default_config_dirs=[])
    for name, value in options.items():
        group, _, option = name.rpartition("__")
        config.set_override(option, value, group)
    return config

# SPDX-License-Identifier: Apache-2.0
"""The entry points of oslo-config-generator and of the configuration reference."""

from __future__ import annotations

from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.conf import nova


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Return every group with its options, in the order of the sample file."""
    return [(module.GROUP, list(module.OPTIONS)) for module in conf.GROUPS]


def list_nova_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """The same of what stands in nova.conf."""
    return [(nova.GROUP, list(nova.OPTIONS))]

# SPDX-License-Identifier: Apache-2.0
"""Has Nova's API check the extra spec of flavors. Loaded by nova-api, which has no libvirt."""

from typing import Any

from nova.api.validation.extra_specs import base

from nova_dmigrate.virt.policy import EXTRA_SPEC, Policy


def register() -> list[Any]:
    """The validators: entry point ``nova.api.extra_spec_validators``."""
    return [
        base.ExtraSpecValidator(
            name=EXTRA_SPEC,
            description=(
                "Whether live migrations read the database's buffer pool from the volume"
                " (nova-dmigrate): never, where possible, or else do not take place."
            ),
            value={
                "type": str,
                "description": "The policy of servers of this flavor.",
                "enum": [policy.value for policy in Policy],
            },
        )
    ]

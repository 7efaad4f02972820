# SPDX-License-Identifier: Apache-2.0
"""Whether a server's live migration shall use nova-dmigrate: what flavor, image, server and
operator say, in this order.
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from nova_dmigrate import exception

EXTRA_SPEC = "dmigrate:policy"
#: Of the image, and of the server's metadata.
PROPERTY = "dmigrate_policy"
#: Nova keeps the image's properties in the server's system metadata.
_IMAGE_PREFIX = "image_"


class Policy(str, enum.Enum):
    """What live migrations of a server do."""

    DISABLED = "disabled"  # nothing of ours
    PREFERRED = "preferred"  # use the relays where that is possible
    REQUIRED = "required"  # or else do not take place


@dataclasses.dataclass(frozen=True)
class Decision:
    """``source``: who has said it: flavor, image, metadata or default."""

    policy: Policy
    source: str


def decide(instance: Any, default: Policy, from_metadata: bool) -> Decision:
    """The policy of a server.

    :param instance: a nova.objects.Instance, or what has its flavor, system_metadata, metadata.
    :param default: where nobody says anything.
    :param from_metadata: whether the server's metadata count.
    :raises ConfigurationError: what is said is no policy.
    """
    for source, value in _said(instance, from_metadata):
        if value is None:
            continue
        try:
            return Decision(Policy(value.strip().lower()), source)
        except ValueError:
            known = ", ".join(policy.value for policy in Policy)
            raise exception.ConfigurationError(
                reason=f"the policy that the {source} of instance {instance.uuid} has is"
                f" {value!r:.60}, not one of {known}"
            ) from None
    return Decision(default, "default")


def _said(instance: Any, from_metadata: bool) -> Iterator[tuple[str, str | None]]:
    yield "flavor", _get(instance.flavor.extra_specs, EXTRA_SPEC)
    yield "image", _get(instance.system_metadata, _IMAGE_PREFIX + PROPERTY)
    if from_metadata:
        yield "metadata", _get(instance.metadata, PROPERTY)


def _get(mapping: Mapping[str, str] | None, key: str) -> str | None:
    return (mapping or {}).get(key)

# SPDX-License-Identifier: Apache-2.0
"""Neutron's driver of the lab's network: a port is a tap device, whatever the host. Who makes the
device is Nova; who plugs it is a program on the host (`taps`).

Imported by Neutron alone.
"""

from typing import Any

from neutron_lib import constants
from neutron_lib.api.definitions import portbindings
from neutron_lib.plugins.ml2 import api
from sqlalchemy import orm


class TapMechanismDriver(api.MechanismDriver):  # type: ignore[misc]
    """Binds each port at once, on each host."""

    def initialize(self) -> None:
        # Without any service plugin nobody else does so before the first request
        orm.configure_mappers()

    def bind_port(self, context: Any) -> None:
        for segment in context.segments_to_bind:
            context.set_binding(
                segment[api.ID],
                portbindings.VIF_TYPE_TAP,
                {portbindings.CAP_PORT_FILTER: False},
                constants.PORT_STATUS_ACTIVE,
            )
            return

# SPDX-License-Identifier: Apache-2.0
"""The broker's way into the network of the servers, where agents look for it."""

from pathlib import Path

from tests.lab.guest_network import CLIENTS_ADDRESS, GuestNetwork
from tests.lab.openstack.service import Services


def open_broker(services: Services, guests: GuestNetwork, port: int, directory: Path) -> None:
    """Have the broker of 127.0.0.1 listen in the network of the servers as well.

    :param directory: for a socket between the two.
    """
    socket = directory / "broker.sock"
    inside = f"TCP-LISTEN:{port},bind={CLIENTS_ADDRESS},reuseaddr,fork"
    services.start("broker-inside", ["socat", inside, f"UNIX-CONNECT:{socket}"], guests.clients)
    outside = ["socat", f"UNIX-LISTEN:{socket},fork", f"TCP:127.0.0.1:{port}"]
    services.start("broker-outside", outside)

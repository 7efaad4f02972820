# SPDX-License-Identifier: Apache-2.0
"""What a cloud has before it has users: the services' account and catalogue, a network, types of
volumes, flavors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.guest_network import guest_address
from tests.lab.openstack.client import Client
from tests.lab.openstack.neutron import PHYSICAL_NETWORK
from tests.lab.openstack.site import REGION, SERVICE, Site

#: Type of each service but Keystone, which is there.
TYPES = {
    "placement": "placement",
    "glance": "image",
    "neutron": "network",
    "cinder": "block-storage",
    "nova": "compute",
}
_SUBNET = "198.51.100.0/24"
_LAST_GUEST = 99


@dataclass(frozen=True)
class Network:
    """The network of all servers, in which DHCP is nobody's: servers are told their addresses."""

    id: str
    subnet: str


def accounts(site: Site, client: Client) -> None:
    """Make the account of the services, and the catalogue; Keystone runs."""
    identity = client.sdk.identity
    project = identity.create_project(name=SERVICE, domain_id="default")
    user = identity.create_user(
        name=SERVICE, domain_id="default", password=site.password, default_project_id=project.id
    )
    roles: dict[str, Any] = {each.name: each for each in identity.roles()}
    for name in ("admin", SERVICE):
        role = roles.get(name) or identity.create_role(name=name)
        identity.assign_project_role_to_user(project, user, role)
    for name, kind in TYPES.items():
        service = identity.create_service(name=name, type=kind)
        for interface in ("public", "internal"):
            identity.create_endpoint(
                service_id=service.id, interface=interface, url=site.url(name), region_id=REGION
            )


def network(client: Client) -> Network:
    """Make the network of the servers; Neutron runs."""
    sdk = client.sdk.network
    made = sdk.create_network(
        name="guests",
        provider_network_type="flat",
        provider_physical_network=PHYSICAL_NETWORK,
        is_shared=True,
    )
    subnet = sdk.create_subnet(
        name="guests",
        network_id=made.id,
        ip_version=4,
        cidr=_SUBNET,
        gateway_ip=None,
        is_dhcp_enabled=False,
        allocation_pools=[{"start": guest_address(0), "end": guest_address(_LAST_GUEST)}],
    )
    return Network(made.id, subnet.id)


def volume_types(client: Client, names: Sequence[str]) -> None:
    """Make the types of volumes, one for each of Cinder's backends; Cinder's API runs."""
    for name in names:
        specs = {"volume_backend_name": name}
        client.sdk.block_storage.create_type(name=name, extra_specs=specs)


def flavor(client: Client, name: str, ram_mb: int, disk_gb: int, **specs: str) -> Any:
    """Make a flavor with one processor.

    :param specs: extra specs, with ``__`` for the colon.
    """
    made = client.sdk.compute.create_flavor(name=name, ram=ram_mb, vcpus=1, disk=disk_gb)
    if specs:
        named = {key.replace("__", ":"): value for key, value in specs.items()}
        client.sdk.compute.create_flavor_extra_specs(made, named)
    return made

# SPDX-License-Identifier: Apache-2.0
"""Neutron: its API alone. There is one network, that of the lab's guests, and each host plugs its
interfaces itself (`taps`).
"""

from pathlib import Path

from tests.lab.openstack.site import Site
from tests.lab.openstack.venv import ROOT, VENV, program

DATABASES = ("neutron",)
#: The network as Neutron's administrators name it.
PHYSICAL_NETWORK = "guests"
_NAME = "neutron"
_FILE = f"{_NAME}/neutron.conf"
_MECHANISM = "tests.lab.openstack.mechanism:TapMechanismDriver"


def configure(site: Site) -> None:
    """Write its configuration."""
    site.configure(
        _FILE,
        {
            "DEFAULT": {
                "core_plugin": "ml2",
                "service_plugins": "",
                "auth_strategy": "keystone",
                "api_paste_config": VENV / "etc/neutron/api-paste.ini",
                "dhcp_agent_notification": False,
                "notify_nova_on_port_status_changes": False,
                "notify_nova_on_port_data_changes": False,
            },
            "database": {"connection": site.database.url(_NAME)},
            "ml2": {
                "type_drivers": "flat",
                "tenant_network_types": "",
                "mechanism_drivers": "lab_tap",
                "extension_drivers": "",
            },
            "ml2_type_flat": {"flat_networks": PHYSICAL_NETWORK},
        },
        site.checks_tokens(),
    )
    _advertise(_plugins(site))


def make_schema(site: Site) -> None:
    """Make its tables.

    :raises ServiceError: that failed.
    """
    file = str(site.directory / _FILE)
    manage = [program("neutron-db-manage"), "--config-file", file]
    site.services.run("neutron-db-manage", [*manage, "upgrade", "heads"])


def start(site: Site) -> None:
    """Start its API."""
    here = site.directory / _NAME
    site.start_api(
        _NAME,
        "neutron.wsgi.api",
        {
            "OS_NEUTRON_CONFIG_FILES": str(here / "neutron.conf"),
            "PYTHONPATH": f"{ROOT}:{_plugins(site)}",
        },
    )


def _plugins(site: Site) -> Path:
    return site.directory / _NAME / "plugins"


def _advertise(directory: Path) -> None:
    """Write the metadata of a package, in which Neutron looks for drivers."""
    metadata = directory / "lab_tap-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-tap\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[neutron.ml2.mechanism_drivers]\nlab_tap = {_MECHANISM}\n"
    )

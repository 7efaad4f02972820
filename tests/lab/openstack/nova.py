# SPDX-License-Identifier: Apache-2.0
"""Nova's control plane: API, conductor and scheduler, with one cell."""

from tests.lab.openstack.configuration import Options
from tests.lab.openstack.site import REGION, Site
from tests.lab.openstack.venv import VENV, program

DATABASES = ("nova_api", "nova_cell0", "nova")
_NAME = "nova"
_FILE = f"{_NAME}/nova.conf"
_PASTE = VENV / "etc/nova/api-paste.ini"
#: A cell has the places that are in the configuration of who asks.
_ITS_OWN = "{scheme}://{username}:{password}@{hostname}:{port}/{path}?{query}"
#: A machine that has other things to do must not look like a dead host.
_PATIENT = {"service_down_time": 600, "rpc_response_timeout": 300, "long_rpc_timeout": 1800}


def asks_others(site: Site) -> Options:
    """The part of Nova's configuration, on all hosts, for other services."""
    return {
        "DEFAULT": {**_PATIENT, "use_rootwrap_daemon": False},
        "glance": {**site.account(), "valid_interfaces": "public"},
        "placement": site.account(),
        "neutron": {**site.account(), "valid_interfaces": "public"},
        "cinder": {"catalog_info": "block-storage::publicURL", "os_region_name": REGION},
        "service_user": {**site.account(), "send_service_user_token": True},
        "barbican_service_user": site.account(),
        "key_manager": {"backend": "nova.keymgr.conf_key_mgr.ConfKeyManager"},
        "vnc": {"enabled": False},
        "oslo_messaging_notifications": {"driver": "log"},
        "notifications": {"notification_format": "unversioned"},
    }


def configure(site: Site) -> None:
    """Write its configuration."""
    site.configure(
        _FILE,
        asks_others(site),
        {
            "DEFAULT": {"my_ip": "127.0.0.1", "host": "control"},
            "api_database": {"connection": site.database.url("nova_api")},
            "database": {"connection": site.database.url("nova")},
            "conductor": {"workers": 1},
            "scheduler": {"workers": 1, "discover_hosts_in_cells_interval": 10},
        },
        site.checks_tokens(),
    )


def make_schema(site: Site) -> None:
    """Make its tables, and the one cell.

    :raises ServiceError: that failed.
    """
    file = str(site.directory / _FILE)
    manage = [program("nova-manage"), "--config-file", file]
    cell0 = _ITS_OWN.replace("{path}", "nova_cell0")
    cell = ["--name", "lab", "--database_connection", _ITS_OWN, "--transport-url", _ITS_OWN]
    for command in (
        ["api_db", "sync"],
        ["cell_v2", "map_cell0", "--database_connection", cell0],
        ["cell_v2", "create_cell", *cell],
        ["db", "sync"],
    ):
        site.services.run("nova-manage", [*manage, *command])


def start(site: Site) -> None:
    """Start its services."""
    file = str(site.directory / _FILE)
    # It looks for its pipelines in the first one
    files = {"OS_NOVA_CONFIG_FILES": f"{_PASTE};{file}"}
    site.start_api(_NAME, "nova.wsgi.osapi_compute", files)
    for name in ("nova-conductor", "nova-scheduler"):
        site.services.start(name, [program(name), "--config-file", file])

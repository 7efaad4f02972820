# SPDX-License-Identifier: Apache-2.0
"""Cinder: volumes, on all storages of the cloud."""

from collections.abc import Sequence

from tests.lab.openstack.site import Site
from tests.lab.openstack.storage import Storage
from tests.lab.openstack.venv import VENV, program

DATABASES = ("cinder",)
_NAME = "cinder"
_FILE = f"{_NAME}/cinder.conf"


def configure(site: Site, storages: Sequence[Storage]) -> None:
    """Write its configuration.

    :param storages: that of volumes of which nothing is said comes first.
    """
    here = site.directory / _NAME
    (here / "state").mkdir(parents=True)
    site.configure(
        _FILE,
        {
            "DEFAULT": {
                "auth_strategy": "keystone",
                "api_paste_config": VENV / "etc/cinder/api-paste.ini",
                "resource_query_filters_file": VENV / "etc/cinder/resource_filters.json",
                "glance_api_servers": site.url("glance"),
                "my_ip": "127.0.0.1",
                "host": "storage",
                "enabled_backends": [each.name for each in storages],
                "default_volume_type": storages[0].name,
                "service_down_time": 600,
            },
            "database": {"connection": site.database.url(_NAME)},
            "coordination": {"backend_url": f"file://{here}/state"},
        },
        *(each.cinder_options() for each in storages),
        site.checks_tokens(),
    )


def make_schema(site: Site) -> None:
    """Make its tables.

    :raises ServiceError: that failed.
    """
    file = str(site.directory / _FILE)
    site.services.run(
        "cinder-manage", [program("cinder-manage"), "--config-file", file, "db", "sync"]
    )


def start(site: Site, storages: Sequence[Storage]) -> None:
    """Start its API, scheduler and volume service."""
    file = str(site.directory / _FILE)
    site.start_api(_NAME, "cinder.wsgi.api", {}, f"--config-file {file}")
    site.services.start("cinder-scheduler", [program("cinder-scheduler"), "--config-file", file])
    script = " && ".join([*(each.cinder_setup() for each in storages), 'exec "$@"'])
    volume = [program("cinder-volume"), "--config-file", file]
    site.services.start(
        "cinder-volume", ["unshare", "--mount", "--", "sh", "-c", script, "sh", *volume]
    )

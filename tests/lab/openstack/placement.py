# SPDX-License-Identifier: Apache-2.0
"""Placement: what hosts have, and which servers take it."""

from tests.lab.openstack.site import Site
from tests.lab.openstack.venv import program

DATABASES = ("placement",)
_NAME = "placement"
_FILE = f"{_NAME}/placement.conf"


def configure(site: Site) -> None:
    """Write its configuration."""
    site.configure(
        _FILE,
        {"placement_database": {"connection": site.database.url(_NAME)}},
        {"api": {"auth_strategy": "keystone"}},
        site.checks_tokens(),
    )


def make_schema(site: Site) -> None:
    """Make its tables.

    :raises ServiceError: that failed.
    """
    file = str(site.directory / _FILE)
    manage = [program("placement-manage"), "--config-file", file]
    site.services.run("placement-manage", [*manage, "db", "sync"])


def start(site: Site) -> None:
    """Start its API."""
    here = str(site.directory / _NAME)
    site.start_api(_NAME, "placement.wsgi.api", {"OS_PLACEMENT_CONFIG_DIR": here})

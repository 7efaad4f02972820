# SPDX-License-Identifier: Apache-2.0
"""Keystone: accounts, tokens and the catalogue of all APIs."""

from tests.lab.openstack.site import ADMIN, REGION, Site
from tests.lab.openstack.venv import program

DATABASES = ("keystone",)
_NAME = "keystone"
_FILE = f"{_NAME}/keystone.conf"


def configure(site: Site) -> None:
    """Write its configuration."""
    here = site.directory / _NAME
    site.configure(
        _FILE,
        {
            "database": {"connection": site.database.url(_NAME)},
            "fernet_tokens": {"key_repository": here / "fernet"},
            "credential": {"key_repository": here / "credential"},
        },
    )


def make_schema(site: Site) -> None:
    """Make its tables.

    :raises ServiceError: that failed.
    """
    _manage(site, "db_sync")


def bootstrap(site: Site) -> None:
    """Make its keys, the administrator, and its own entry in the catalogue.

    :raises ServiceError: that failed.
    """
    here = site.directory / _NAME
    owner = ["--keystone-user", "root", "--keystone-group", "root"]
    for kind in ("fernet", "credential"):
        (here / kind).mkdir()
        _manage(site, f"{kind}_setup", *owner)
    url = site.url(_NAME)
    names = ["--bootstrap-username", ADMIN, "--bootstrap-project-name", ADMIN]
    names += ["--bootstrap-password", site.password, "--bootstrap-region-id", REGION]
    urls = [f"--bootstrap-{interface}-url={url}" for interface in ("public", "internal")]
    _manage(site, "bootstrap", *names, *urls)


def start(site: Site) -> None:
    """Start its API."""
    here = str(site.directory / _NAME)
    site.start_api(_NAME, "keystone.wsgi.api", {"OS_KEYSTONE_CONFIG_DIR": here})


def _manage(site: Site, *command: str) -> None:
    file = str(site.directory / _FILE)
    site.services.run(
        "keystone-manage", [program("keystone-manage"), "--config-file", file, *command]
    )

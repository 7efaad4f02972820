# SPDX-License-Identifier: Apache-2.0
"""Glance: images, as files."""

from tests.lab.openstack.site import Site
from tests.lab.openstack.venv import VENV, program

DATABASES = ("glance",)
_NAME = "glance"
_FILE = f"{_NAME}/glance-api.conf"
_PASTE = VENV / "etc/glance/glance-api-paste.ini"


def configure(site: Site) -> None:
    """Write its configuration."""
    here = site.directory / _NAME
    for each in ("images", "staging", "tasks"):
        (here / each).mkdir(parents=True)
    site.configure(
        _FILE,
        {
            "DEFAULT": {
                "enabled_backends": "files:file",
                "enabled_import_methods": "[]",
                "node_staging_uri": f"file://{here}/staging",
                "worker_self_reference_url": site.url(_NAME),
            },
            "database": {"connection": site.database.url(_NAME)},
            "paste_deploy": {"flavor": "keystone", "config_file": _PASTE},
            "glance_store": {"default_backend": "files"},
            "files": {"filesystem_store_datadir": here / "images"},
            "os_glance_staging_store": {"filesystem_store_datadir": here / "staging"},
            "os_glance_tasks_store": {"filesystem_store_datadir": here / "tasks"},
        },
        site.checks_tokens(),
    )


def make_schema(site: Site) -> None:
    """Make its tables.

    :raises ServiceError: that failed.
    """
    file = str(site.directory / _FILE)
    manage = [program("glance-manage"), "--config-file", file]
    site.services.run("glance-manage", [*manage, "db_sync"])


def start(site: Site) -> None:
    """Start its API."""
    here = str(site.directory / _NAME)
    site.start_api(_NAME, "glance.wsgi.api", {"OS_GLANCE_CONFIG_DIR": here})

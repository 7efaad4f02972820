# SPDX-License-Identifier: Apache-2.0
"""The databases of all services as they are before anybody has used them. Making them takes longer
than all else of the cloud's start: it is done once, and kept in the virtual environment.
"""

import hashlib
import inspect
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests.lab import image
from tests.lab.openstack import database
from tests.lab.openstack.site import Site
from tests.lab.openstack.venv import CONSTRAINTS, VENV


def start_database(site: Site, parts: Sequence[ModuleType]) -> None:
    """Start the database with the schemas of services, whose configuration is written.

    :param parts: modules of services, each with DATABASES and ``make_schema``.
    :raises ServiceError: that failed.
    """
    databases = [name for part in parts for name in part.DATABASES]
    kept = VENV / f"schemas-{_key(parts)}"
    with image.locked(VENV / "schemas.lock"):
        if not kept.is_dir():
            image.into_place(kept, lambda directory: _make(site, parts, databases, directory))
    shutil.copytree(kept / "data", site.database.directory)
    site.database.start(databases)


def _make(
    site: Site, parts: Sequence[ModuleType], databases: Sequence[str], directory: Path
) -> None:
    site.database.install()
    site.database.start(databases)
    with ThreadPoolExecutor(2) as pool:
        for made in [pool.submit(part.make_schema, site) for part in parts]:
            made.result()
    site.database.stop()
    shutil.move(site.database.directory, directory / "data")


def _key(parts: Sequence[ModuleType]) -> str:
    digest = hashlib.sha256(CONSTRAINTS.read_bytes())
    for each in (database, *(part.make_schema for part in parts)):
        digest.update(inspect.getsource(each).encode())
    return digest.hexdigest()[:16]

# SPDX-License-Identifier: Apache-2.0
"""The shortest scenario: in a cloud on Ceph a database server under load, whose flavor prefers the
relays, and one that is not to use them are migrated by ``tests/scenario``.

Prints the results of its tests, as subunit. The clients' ledger is checked at the end.

Exit status: 0 the tests were carried out and the database is whole; 1 not so. Whether they have
passed is for who reads the results.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab.demo.compare import say
from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.guest import tiny_image
from tests.lab.openstack.scene import CEPH, Scene, server_name
from tests.lab.openstack.site import REGION, Site
from tests.lab.openstack.venv import ROOT, VENV, program
from tests.lab.openstack.working import Shape
from tests.lab.processes import workspace

#: All memory takes longer than an emulated guest on a busy machine needs for its map; what changes
#: takes much less of the network than there is.
_SHAPE = Shape(ram_mb=640, pool_mb=256, network=2.5, rate=1)
_CLOUD, _IMAGE = "lab", "tiny"
_CONFIGURATION = "tests/scenario/stestr.conf"
#: By regular expressions of tests what they have to know.
_TESTS = {
    "test_it_migrates_by_its_own_policy": {
        "DMIGRATE_SERVER": server_name(CEPH),
        "DMIGRATE_EXPECT": "dmigrate",
    },
    "test_a_server_that_is_not_to_use_the_relays": {
        "DMIGRATE_IMAGE": _IMAGE,
        "DMIGRATE_NETWORK": "none",
        "DMIGRATE_MEMORY": "128",
        "DMIGRATE_DISK": "1",
    },
}


def write_clouds(site: Site, path: Path) -> None:
    """Write what clients of the cloud's have to know, as JSON, which is YAML as well."""
    cloud = {"auth": site.administrator(), "region_name": REGION}
    path.write_text(json.dumps({"clouds": {_CLOUD: cloud}}))


def run(regex: str, settings: dict[str, str], directory: Path) -> None:
    """Run tests, whose results are printed."""
    results = directory / "results"
    results.mkdir(exist_ok=True)
    argv = [program("stestr"), "--config", _CONFIGURATION, "--repo-url", str(results)]
    path = os.pathsep.join((str(VENV / "bin"), os.environ["PATH"]))
    clouds = {"OS_CLIENT_CONFIG_FILE": str(directory / "clouds.yaml"), "OS_CLOUD": _CLOUD}
    subprocess.run(
        [*argv, "run", "--subunit", "--concurrency", "1", regex],
        cwd=ROOT, env={**os.environ, **clouds, **settings, "PATH": path}, check=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with workspace() as directory, OpenStack(directory, (CephStorage,), say) as cloud:
        write_clouds(cloud.site, directory / "clouds.yaml")
        tiny_image(cloud, _IMAGE)
        with Scene(cloud, CEPH, _SHAPE, say, dmigrate__policy="preferred") as scene:
            for regex, settings in _TESTS.items():
                say(f"tests/scenario: {regex}")
                run(regex, settings, directory)
            say("Checking the database")
            wrong = scene.wrong_with_data()
    for line in wrong:
        say(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

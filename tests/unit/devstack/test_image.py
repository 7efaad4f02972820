# SPDX-License-Identifier: Apache-2.0
"""The image with the agent, which is built where it is wanted."""

import os
from pathlib import Path

from tests import base
from tests.unit.devstack.node import ALL_IN_ONE, ROOT, Node

#: Notes what it is told, and leaves an image.
_DISK_IMAGE_CREATE = """#!/usr/bin/env bash
env | grep -E '^(DIB|ELEMENTS)' | sort >"$CLOUD/environment"
printf '%s\\n' "$@" >"$CLOUD/arguments"
while [[ "$1" != -o ]]; do shift; done
if [[ -e "$CLOUD/broken" ]]; then echo half >"$2.qcow2"; exit 1; fi
echo image >"$2.qcow2"
"""
#: pip alone is not the real one: it would need the network.
_PYTHON = f"""#!/usr/bin/env bash
if [[ "$1 $2 $3" == "-m pip wheel" ]]; then
    mkdir -p "$6"
    touch "$6/nova_dmigrate-1.2.3.dev4-py3-none-any.whl"
else
    exec {os.path.realpath("/usr/bin/python3")} "$@"
fi
"""


class ImageTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        # Nothing of RabbitMQ, whose tool wants the package
        self.node = Node(self.make_directory(), ALL_IN_ONE.removeprefix("rabbit,"))
        self.node.variables |= {
            "NOVA_DMIGRATE_BUILD_IMAGE": "True",
            "NOVA_DMIGRATE_FLAVOR": "",
            "PYTHON_PREFIX": self.node.path("bin"),
        }
        for name, text in (("disk-image-create", _DISK_IMAGE_CREATE), ("python3", _PYTHON)):
            program = Path(self.node.path(f"bin/{name}"))
            program.write_text(text)
            program.chmod(0o755)
        self.file = Path(self.node.path("data/nova-dmigrate/images/dmigrate-database.qcow2"))

    def told(self, what: str) -> list[str]:
        return Path(self.node.path(f"cloud/{what}")).read_text().splitlines()

    def test_none_is_built_unless_it_is_wanted(self) -> None:
        del self.node.variables["NOVA_DMIGRATE_BUILD_IMAGE"]
        self.node.stack()
        self.assertEqual([], self.node.called("pip_install"))
        self.assertEqual([], self.node.called("openstack"))

    def test_it_has_a_server_and_the_agent_of_this_tree(self) -> None:
        self.node.stack()
        self.assertEqual([("diskimage-builder",)], self.node.called("pip_install"))
        self.assertEqual(
            [
                "DIB_NOVA_DMIGRATE_PACKAGE=nova-dmigrate[agent]==1.2.3.dev4",
                f"DIB_NOVA_DMIGRATE_WHEELS={self.file.parent}/wheels",
                f"ELEMENTS_PATH={ROOT}/elements",
            ],
            self.told("environment"),
        )
        self.assertEqual(
            [
                *("-t", "qcow2", "-o", f"{self.file.with_suffix('')}.partial"),
                *("-p", "mariadb-server", "debian", "vm", "block-device-mbr"),
                *("cloud-init", "nova-dmigrate-agent"),
            ],
            self.told("arguments"),
        )

    def test_glance_gets_it(self) -> None:
        self.node.stack()
        self.assertEqual(
            (
                *("--os-cloud", "devstack-admin", "image", "create", "--public"),
                *("--container-format", "bare", "--disk-format", "qcow2"),
                *("--file", str(self.file), "dmigrate-database"),
            ),
            self.node.called("openstack")[-1],
        )
        self.assertEqual("image\n", self.file.read_text())

    def test_elements_and_packages_can_be_others(self) -> None:
        self.node.variables |= {
            "NOVA_DMIGRATE_IMAGE_ELEMENTS": "ubuntu-minimal vm",
            "NOVA_DMIGRATE_IMAGE_PACKAGES": "mysql-server sysbench",
        }
        self.node.stack()
        self.assertEqual(
            ["-p", "mysql-server,sysbench", "ubuntu-minimal", "vm", "nova-dmigrate-agent"],
            self.told("arguments")[4:],
        )

    def test_it_is_built_and_given_once(self) -> None:
        self.node.stack()
        self.node.stack()
        self.assertEqual([], self.node.called("pip_install"))
        self.assertEqual(1, len(self.node.called("openstack")))

    def test_an_image_that_was_built_before_is_given_to_a_new_glance(self) -> None:
        self.node.stack()
        Path(self.node.path("cloud/image.dmigrate-database")).unlink()
        self.node.stack()
        self.assertEqual([], self.node.called("pip_install"))
        self.assertEqual("create", self.node.called("openstack")[-1][3])

    def test_half_an_image_is_no_image(self) -> None:
        Path(self.node.path("cloud/broken")).touch()
        self.assertNotEqual(0, self.node.attempt("stack extra").returncode)
        self.assertFalse(self.file.exists())
        Path(self.node.path("cloud/broken")).unlink()
        self.node.stack()
        self.assertEqual("image\n", self.file.read_text())

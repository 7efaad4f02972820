# SPDX-License-Identifier: Apache-2.0
"""The diskimage-builder element installs an agent that runs; cloud-init accepts its snippet.

The image is this machine itself, seen through an overlay in a mount namespace of its own: what the
hooks write is gone with the namespace. The agent's dependencies are those of the test's own virtual
environment, so that nothing is downloaded.
"""

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import yaml

from tests import base
from tests.lab import image, processes

ROOT = Path(__file__).parents[2]
ELEMENTS = ROOT / "elements"
ELEMENT = ELEMENTS / "nova-dmigrate-agent"
UNIT = ROOT / "etc" / "systemd" / "nova-dmigrate-agent.service"
CLOUD_CONFIG = ROOT / "etc" / "cloud-init" / "nova-dmigrate-agent.yaml"
SCHEMA = "usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"

#: Arguments: workspace, element. Standard output is what the last command in the image prints.
BUILD = r"""
set -eu
space=$1 element=$2
mount -t tmpfs none "$space"
mkdir "$space"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$space/upper,workdir=$space/work" "$space/root"
root=$space/root
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
for each in "$element"/environment.d/*; do source "$each"; done
hooks=$root/tmp/in_target.d
mkdir -p "$hooks"
cp -r "$element"/*.d "$hooks"
for each in "$hooks"/extra-data.d/*; do TMP_HOOKS_PATH=$hooks "$each"; done
for phase in install.d post-install.d; do
    for each in "$hooks/$phase"/*; do chroot "$root" "${each#"$root"}" >&2; done
done
chroot "$root" sh -c "$3"
"""


class TestElement(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(None if os.geteuid() == 0 else "needs root")

    def build(self, command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run all hooks, and ``command`` in what they have made."""
        space = self.enter_workspace()
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", BUILD, "bash"]
            + [str(space), str(ELEMENT), command],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                "PATH": f"{self.fake_systemctl()}:{Path(sys._base_executable).parent}"  # type: ignore[attr-defined]
                ":/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "DIB_INIT_SYSTEM": "systemd",
                **environment,
            },
        )

    def enter_workspace(self) -> Path:
        space = processes.make_workspace()
        self.addCleanup(processes.drop_workspace, space)
        return space

    def fake_systemctl(self) -> Path:
        """systemctl, where there is none, enables a unit as the real one does without systemd."""
        directory = self.make_directory()
        if shutil.which("systemctl") is None:
            program = directory / "systemctl"
            program.write_text(
                '#!/bin/sh\n[ "$1" = enable ] || exit 1\n'
                "wanted=/etc/systemd/system/multi-user.target.wants\n"
                'mkdir -p $wanted && ln -sf "/etc/systemd/system/$2" "$wanted/$2"\n'
            )
            program.chmod(0o755)
        return directory

    def make_wheels(self) -> Path:
        """A directory with a wheel of this tree; nothing is built inside of the tree."""
        source, wheels = self.make_directory() / "source", self.make_directory()
        for part in ("nova_dmigrate", "etc"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        for part in ("setup.py", "setup.cfg", "pyproject.toml", "README.rst", "requirements.txt"):
            shutil.copy(ROOT / part, source)
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
            + [f"--wheel-dir={wheels}", str(source)],
            check=True,
            env={**os.environ, "PBR_VERSION": "1.2.3"},
        )
        return wheels

    def test_the_image_has_an_agent_that_runs_its_unit_and_its_configuration(self) -> None:
        done = self.build(
            "cd /etc/systemd/system && cat nova-dmigrate-agent.service.d/image.conf"
            " && readlink multi-user.target.wants/nova-dmigrate-agent.service"
            " && cmp nova-dmigrate-agent.service "
            + str(ROOT / "etc/systemd/nova-dmigrate-agent.service")
            + " && cat /etc/nova-dmigrate/nova-dmigrate-agent.conf"
            " && stat -c %a /etc/nova-dmigrate/nova-dmigrate-agent.conf.d"
            " && /opt/nova-dmigrate/bin/pip list"
            f" && export PYTHONPATH={':'.join(site.getsitepackages())}"
            " && nova-dmigrate-agent grants --flavour mariadb --version 10.11",
            DIB_NOVA_DMIGRATE_WHEELS=str(self.make_wheels()),
            DIB_NOVA_DMIGRATE_PIP_OPTIONS="--no-index --no-deps",
        )
        self.assertEqual(0, done.returncode, done.stderr[-2000:])
        for expected in (
            "ExecStart=\nExecStart=/opt/nova-dmigrate/bin/nova-dmigrate-agent serve\n",
            "ConditionPathExists=/etc/nova-dmigrate/nova-dmigrate-agent.conf.d/instance.conf\n",
            "/nova-dmigrate-agent.service\n",
            "transport = broker\n",
            "\n700\n",
            "GRANT SUPER ON *.* TO 'nova_dmigrate'@'localhost';\n",
        ):
            self.assertIn(expected, done.stdout)
        self.assertRegex(done.stdout, r"\nnova-dmigrate +1\.2\.3\n")
        self.assertFalse(Path("/opt/nova-dmigrate/bin/nova-dmigrate-agent").exists())

    def test_an_unknown_transport_ends_the_build(self) -> None:
        done = self.build("true", DIB_NOVA_DMIGRATE_TRANSPORT="pigeon")
        self.assertNotEqual(0, done.returncode)
        self.assertIn("not broker or channel", done.stderr)

    def test_another_init_system_ends_the_build(self) -> None:
        script = ELEMENT / "post-install.d" / "60-nova-dmigrate-agent"
        done = subprocess.run(
            [script],
            env={**os.environ, "DIB_INIT_SYSTEM": "openrc"},
            capture_output=True,
            text=True,
        )
        self.assertNotEqual(0, done.returncode)
        self.assertIn("openrc is not supported", done.stderr)

    def test_diskimage_builder_resolves_it(self) -> None:
        installed = importlib.util.find_spec("diskimage_builder")
        base.require(None if installed else "diskimage-builder is not installed")
        from diskimage_builder import element_dependencies, paths

        found = element_dependencies.get_elements(
            ["debian-minimal", "vm", "block-device-mbr", "cloud-init", "nova-dmigrate-agent"],
            f"{ELEMENTS}:{paths.get_path('elements')}",
        )
        names = {name for name, _ in found}
        self.assertLessEqual({"nova-dmigrate-agent", "ensure-venv", "package-installs"}, names)


class TestCloudConfig(base.TestCase):
    def test_it_fits_the_schema_of_cloud_init(self) -> None:
        installed = importlib.util.find_spec("jsonschema")
        base.require(None if installed else "jsonschema is not installed")
        schema = self.schema()
        base.require(None if schema else "cloud-init's package cannot be had")
        import jsonschema

        validator = jsonschema.Draft4Validator(schema)
        config = yaml.safe_load(CLOUD_CONFIG.read_text())
        self.assertEqual([], [error.message for error in validator.iter_errors(config)])
        # A schema that accepts everything would prove nothing
        config["write_files"][0]["permissions"] = 600
        self.assertFalse(validator.is_valid(config))

    @staticmethod
    def schema() -> object | None:
        """That of Debian's cloud-init, which is unpacked, not installed."""
        target = image.cache_directory() / "cloud-init-schema.json"
        if not target.exists():
            with processes.workspace() as directory:
                os.chmod(directory, 0o755)
                done = subprocess.run(
                    ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "cloud-init"],
                    cwd=directory,
                    capture_output=True,
                    timeout=100,
                    check=False,
                )
                packages = list(directory.glob("*.deb"))
                if done.returncode or not packages:
                    return None
                subprocess.run(["dpkg-deb", "-x", packages[0], directory], check=True)
                partial = target.with_suffix(f".{os.getpid()}")
                shutil.copy(directory / SCHEMA, partial)
                partial.replace(target)
        loaded: object = json.loads(target.read_text())
        return loaded

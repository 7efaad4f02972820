# SPDX-License-Identifier: Apache-2.0
"""What brings the agent into an image and starts it there: the element, the cloud-config."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nova_dmigrate.agent import database
from tests import base

ROOT = Path(__file__).parents[2]
ELEMENT = ROOT / "elements" / "nova-dmigrate-agent"
CLOUD_CONFIG = ROOT / "etc" / "cloud-init" / "nova-dmigrate-agent.yaml"
INSTANCE = "01234567-89ab-cdef-0123-456789abcdef"
UNIT = ROOT / "etc" / "systemd" / "nova-dmigrate-agent.service"


def scripts() -> list[Path]:
    return [
        path
        for phase in ("environment.d", "extra-data.d", "install.d", "post-install.d")
        for path in sorted((ELEMENT / phase).iterdir())
    ]


class ElementTest(base.TestCase):
    def test_the_shell_can_parse_every_script(self) -> None:
        self.assertGreaterEqual(len(scripts()), 4)
        for script in scripts():
            subprocess.run(["bash", "-n", str(script)], check=True)

    def test_what_is_run_can_be_run_and_stops_at_the_first_error(self) -> None:
        for script in scripts():
            sourced = script.parent.name == "environment.d"
            self.assertEqual(not sourced, os.access(script, os.X_OK), script)
            self.assertRegex(script.name, r"^\d\d-[a-z-]+$")
            if not sourced:
                text = script.read_text()
                self.assertTrue(text.startswith("#!/bin/bash\n"), script)
                self.assertIn("\nset -eu\nset -o pipefail\n", text)

    def test_every_variable_has_a_default_and_is_told_of(self) -> None:
        names = set(re.findall(r"DIB_NOVA_\w+", "".join(each.read_text() for each in scripts())))
        readme = (ELEMENT / "README.rst").read_text()
        environment = (ELEMENT / "environment.d" / "10-nova-dmigrate-agent").read_text()
        for name in names:
            self.assertIn(f"``{name}``", readme)
            self.assertIn(f"export {name}=${{{name}:-", environment)
        self.assertEqual(set(re.findall(r"DIB_NOVA_\w+", readme)), names)

    def test_every_package_has_a_name_for_every_distribution(self) -> None:
        packages = yaml.safe_load((ELEMENT / "package-installs.yaml").read_text())
        names = json.loads((ELEMENT / "pkg-map").read_text())["default"]
        self.assertEqual(set(packages), set(names))

    def test_the_unit_of_the_package_is_the_one_that_is_installed(self) -> None:
        setup = (ROOT / "setup.cfg").read_text()
        self.assertRegex(
            setup, r"share/nova-dmigrate =\s+etc/systemd/nova-dmigrate-agent\.service\n"
        )
        script = (ELEMENT / "install.d" / "60-nova-dmigrate-agent").read_text()
        self.assertIn("$venv/share/nova-dmigrate/$unit", script)
        # The drop-in replaces the only command of the unit
        self.assertEqual(1, UNIT.read_text().count("\nExecStart"))
        self.assertIn("nova-dmigrate-agent serve", script)


class CloudConfigTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.text = CLOUD_CONFIG.read_text()
        # As cloud-init does it
        rendered = jinja2.Template(self.text, undefined=jinja2.StrictUndefined).render(
            v1={"instance_id": INSTANCE}
        )
        self.config: dict[str, Any] = yaml.safe_load(rendered)
        _, _, self.sql_script = self.config["runcmd"][0]

    def test_cloud_init_recognises_it(self) -> None:
        self.assertTrue(self.text.startswith("## template: jinja\n#cloud-config\n"))

    def test_the_file_that_the_agent_waits_for_is_written_and_only_root_can_read_it(self) -> None:
        files = {each["path"]: each for each in self.config["write_files"]}
        condition = "nova-dmigrate-agent.conf.d/instance.conf"
        (path,) = [path for path in files if path.endswith(condition)]
        self.assertEqual("0600", files[path]["permissions"])
        name = f"dmigrate-{INSTANCE}"
        url = f"rabbit://{name}:PASSWORD@broker.example.org:5671/{name}"
        self.assertIn(f"transport_url = {url}\n", files[path]["content"])
        self.assertEqual("0600", files["/etc/nova-dmigrate/client.key"]["permissions"])
        script = (ELEMENT / "install.d" / "60-nova-dmigrate-agent").read_text()
        self.assertIn(f"ConditionPathExists=$etc/{condition}", script)
        # Whatever else that file names is written too
        for name in re.findall(r"= (/etc/\S+)", files[path]["content"]):
            self.assertIn(name, list(files) + [self.password_file()])

    def password_file(self) -> str:
        (found,) = re.findall(r"^file=(\S+)$", self.sql_script, re.MULTILINE)
        return str(found)

    def test_the_sql_user_is_made_with_a_password_that_no_argument_shows(self) -> None:
        for client, answer, flavour, version in (
            ("mysql", "10.11.6-MariaDB-0+deb12u1", "mariadb", (10, 11)),
            ("mariadb", "11.8.2-MariaDB-1", "mariadb", (11, 8)),
            ("mysql", "8.4.3", "mysql", (8, 4)),
        ):
            with self.subTest(answer):
                directory = self.make_directory()
                self.assertEqual("", self.run_commands(directory, client, answer))
                arguments = (directory / "arguments").read_text()
                sql = (directory / "sql").read_text()
                path = directory / "sql-password"
                password = path.read_text()
                self.assertRegex(password, r"^[A-Za-z0-9]{40}$")
                self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
                self.assertNotIn(password, arguments)
                expected = [
                    each.replace("PASSWORD", password) + ";"
                    for each in database.grants(flavour, version)
                ]
                self.assertEqual(expected, sql.splitlines())
                self.assertEqual([], list(directory.glob("*.sql")))

    def test_an_agent_without_an_sql_user_is_started_too(self) -> None:
        for client, version in (("", ""), ("mysql", "")):
            with self.subTest(client):
                directory = self.make_directory()
                said = self.run_commands(directory, client, version)
                self.assertEqual(bool(client), "no database server answers" in said, said)
                # Which its configuration names
                self.assertEqual(40, (directory / "sql-password").stat().st_size)
                self.assertEqual([], list(directory.glob("*.sql")))

    def run_commands(self, directory: Path, client: str, version: str) -> str:
        """Run the commands with a client that notes what it gets: its arguments, its SQL. What is
        told of errors; the agent was started.

        :param version: of the server; empty if it lets nobody in.
        """
        programs = directory / "bin"
        programs.mkdir()
        # Nothing else: this machine may have a client
        for name in ("seq", "tr", "head", "cat", "rm", "sh"):
            (programs / name).symlink_to(f"/usr/bin/{name}")
        for name, text in (
            (
                client or "none",
                f'echo "$@" >>{directory}/arguments\n'
                f'if [ -z "{version}" ]; then exit 1; fi\n'
                f'if [ "$1" = -N ]; then echo {version}; else cat >{directory}/sql; fi',
            ),
            ("sleep", ":"),
            ("systemctl", f'echo "$@" >{directory}/started'),
            ("sed", f'echo "$@" >>{directory}/arguments; exec /usr/bin/env -i /bin/sed "$@"'),
            (
                "nova-dmigrate-agent",
                f'exec {sys.executable} -m nova_dmigrate.cmd.agent "$@"',
            ),
        ):
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        # As cloud-init puts them into one script
        script = "\n".join(
            each if isinstance(each, str) else shlex.join(each) for each in self.config["runcmd"]
        )
        done = subprocess.run(
            ["/bin/sh", "-c", script.replace("/etc/nova-dmigrate", str(directory))],
            check=True,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PATH": str(programs)},
        )
        self.assertEqual(
            "restart nova-dmigrate-agent.service\n", (directory / "started").read_text()
        )
        return done.stderr

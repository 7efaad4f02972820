# SPDX-License-Identifier: Apache-2.0
"""What the jobs name is there."""

import configparser
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests import base
from tests.scenario import settings
from tests.unit.devstack.node import ROOT

_FUNCTIONAL = "openstack-tox-functional-py312"
_PARENTS = {_FUNCTIONAL, "tempest-multinode-full-py3"}


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Whatever stands below that key, wherever."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)


class JobsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.text = (ROOT / ".zuul.yaml").read_text()
        self.items = yaml.safe_load(self.text)
        self.jobs = {item["job"]["name"]: item["job"] for item in self.items if "job" in item}
        self.playbook = (ROOT / "playbooks/scenario/post-run.yaml").read_text()

    def test_every_job_that_runs_is_defined(self) -> None:
        (project,) = [item["project"] for item in self.items if "project" in item]
        named = set()
        for pipeline in ("check", "gate", "experimental"):
            for each in project[pipeline]["jobs"]:
                named |= set(each) if isinstance(each, dict) else {each}
        run = {name for name, job in self.jobs.items() if not job.get("abstract")}
        self.assertEqual(run, named)

    def test_parents_are_known(self) -> None:
        parents = {job["parent"] for job in self.jobs.values()}
        self.assertEqual(set(), parents - set(self.jobs) - _PARENTS)

    def test_the_functional_job_runs_an_environment_that_tox_knows(self) -> None:
        # Of one that it does not know it takes the factors, and runs what all others run
        known = configparser.ConfigParser(interpolation=None)
        known.read(ROOT / "tox.ini")
        (job,) = [each for each in self.jobs.values() if each["parent"] == _FUNCTIONAL]
        environment = job.get("vars", {}).get("tox_envlist", "functional-py312")
        self.assertIn(f"testenv:{environment}", known.sections())
        self.assertIn("functional", known[f"testenv:{environment}"]["commands"])

    def test_the_plugin_runs_on_every_node(self) -> None:
        job = self.jobs["nova-dmigrate-devstack-base"]
        for variables in (job["vars"], job["group-vars"]["subnode"]):
            self.assertIn("nova-dmigrate", variables["devstack_plugins"])

    def test_variables_of_the_plugin_are_described(self) -> None:
        described = (ROOT / "devstack/README.rst").read_text()
        used = {
            name
            for variables in _values(self.items, "devstack_localrc")
            for name in variables
            if name.startswith("NOVA_DMIGRATE")
        }
        self.assertIn("NOVA_DMIGRATE_BUILD_IMAGE", used)
        for name in used:
            self.assertIn(f"``{name}``", described)

    def test_playbooks_are_there(self) -> None:
        for name in _values(self.items, "post-run"):
            self.assertTrue((ROOT / name).is_file(), name)
            yaml.safe_load((ROOT / name).read_text())

    def test_the_scenario_tests_understand_what_the_playbook_tells_them(self) -> None:
        known = settings.from_environment.__doc__ or ""
        names = set(re.findall(r"^ +((?:DMIGRATE|OS)_[A-Z]+):", self.playbook, re.MULTILINE))
        self.assertIn("DMIGRATE_EXPECT", names)
        for name in names:
            self.assertIn(name, known)
        expected = {each.value for each in settings.Expectation}
        self.assertEqual(set(), set(_values(self.items, "scenario_expect")) - expected)

    def test_the_playbook_uses_what_jobs_set(self) -> None:
        used = set(re.findall(r"\b(scenario_(?!venv|key\b)\w+)", self.playbook))
        said = set(re.findall(r"\b(scenario_\w+):", self.text))
        self.assertEqual(used, said)

    def test_guests_that_are_prepared_are_reached(self) -> None:
        every = [job.get("vars", {}) for job in self.jobs.values()]
        prepared = [variables for variables in every if variables.get("scenario_prepare")]
        self.assertTrue(prepared)
        for variables in prepared:
            # devstack's public network has no DHCP by itself, and servers get no config drive
            self.assertEqual("public", variables["scenario_network"])
            self.assertTrue(variables["devstack_localrc"].get("PUBLIC_SUBNET_ENABLE_DHCP"))
        # The default security group lets nobody in
        self.assertRegex(self.playbook, r"security group rule create [^\n]*--dst-port 22")

    def test_no_private_key_is_among_the_logs(self) -> None:
        copied = {path for copies in _values(self.items, "zuul_copy_output") for path in copies}
        self.assertIn("/etc/nova-dmigrate/nova-dmigrate.conf", copied)
        self.assertNotIn("/etc/nova-dmigrate", copied)

    def test_the_playbooks_programs_are_there(self) -> None:
        for path in re.findall(r"(?:project_dir }}|project_dir \+ ')/([\w/.-]+)", self.playbook):
            self.assertTrue((ROOT / path).is_file(), path)

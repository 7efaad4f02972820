# SPDX-License-Identifier: Apache-2.0
"""The tool that gives a guest its credentials at the broker."""

import os
import subprocess
import sys
from pathlib import Path

from nova_dmigrate.rpc import isolation
from tests import base
from tests.unit.devstack.node import HERE, ROOT

TOOL = ROOT / "devstack" / "tools" / "broker_credentials.py"
INSTANCE = "5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e"


class CredentialsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.broker = self.make_directory()

    def run_tool(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, TOOL, *arguments],
            env={
                **os.environ,
                "BROKER": str(self.broker),
                "DMIGRATE_RABBITMQCTL": str(HERE / "rabbitmqctl"),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def add(self) -> str:
        """The password that the guest gets."""
        done = self.run_tool("add", INSTANCE, "--broker", "172.24.5.1:5672")
        self.assertEqual(0, done.returncode, done.stderr)
        url = done.stdout.splitlines()[-1].removeprefix("transport_url = ")
        user = f"dmigrate-{INSTANCE}"
        self.assertTrue(url.startswith(f"rabbit://{user}:"), url)
        self.assertTrue(url.endswith(f"@172.24.5.1:5672/{user}"), url)
        return url.split(":")[2].partition("@")[0]

    def calls(self) -> list[list[str]]:
        return [line.split("\x1f") for line in (self.broker / "calls").read_text().splitlines()]

    def test_the_guest_gets_what_isolates_it(self) -> None:
        password = self.add()
        expected = isolation.commands(INSTANCE, f"password:{password}", "nova-dmigrate")
        self.assertEqual(expected, self.calls())

    def test_every_password_is_another_one(self) -> None:
        self.assertGreaterEqual(len(self.add()), 32)
        self.assertNotEqual(self.add(), self.add())

    def test_adding_again_changes_the_password(self) -> None:
        self.add()
        password = self.add()
        verbs = [call[0] for call in self.calls()]
        self.assertEqual(1, verbs.count("add_user"))
        self.assertEqual(1, verbs.count("add_vhost"))
        change = ["change_password", f"dmigrate-{INSTANCE}", f"password:{password}"]
        self.assertIn(change, self.calls())

    def test_removing_leaves_nothing_and_can_be_done_twice(self) -> None:
        self.add()
        for _ in range(2):
            done = self.run_tool("remove", INSTANCE)
            self.assertEqual(0, done.returncode, done.stderr)
        self.assertEqual("", (self.broker / "users").read_text())
        self.assertEqual("", (self.broker / "vhosts").read_text())
        self.assertEqual(isolation.removal(INSTANCE), self.calls()[-2:])

    def test_what_is_no_instance_is_refused_before_anything_is_done(self) -> None:
        for wrong in ("", "..", "/", INSTANCE.upper(), f"{INSTANCE} "):
            for arguments in (("add", wrong, "--broker", "host"), ("remove", wrong)):
                done = self.run_tool(*arguments)
                self.assertEqual(1, done.returncode)
                self.assertIn("is not the UUID of an instance", done.stderr)
        self.assertFalse((self.broker / "calls").exists())

    def test_a_broker_that_refuses_is_told_without_the_password(self) -> None:
        failing = self.broker / "failing"
        failing.write_text('#!/bin/sh\ncase $2 in list_*) ;; *) echo "no" >&2; exit 64 ;; esac\n')
        failing.chmod(0o755)
        done = self.run_tool(
            "services", DMIGRATE_RABBITMQCTL=str(failing), DMIGRATE_BROKER_PASSWORD="secret"
        )
        self.assertEqual(1, done.returncode)
        self.assertIn("add_user nova-dmigrate has failed with 64", done.stderr)
        self.assertNotIn("secret", done.stderr)

    def test_the_hosts_need_a_password(self) -> None:
        environment = {**os.environ}
        environment.pop("DMIGRATE_BROKER_PASSWORD", None)
        done = self.run_tool("services")
        self.assertEqual(1, done.returncode)
        self.assertIn("DMIGRATE_BROKER_PASSWORD", done.stderr)

    def test_wrong_usage_is_told(self) -> None:
        for arguments in (["add"], ["services", INSTANCE], ["add", INSTANCE], ["else"]):
            self.assertEqual(2, self.run_tool(*arguments).returncode)

    def test_it_is_executable(self) -> None:
        self.assertTrue(os.access(Path(TOOL), os.X_OK))

# SPDX-License-Identifier: Apache-2.0
"""Devstack's tool for credentials at the broker, with a real RabbitMQ."""

import os
import subprocess
import sys
from pathlib import Path

from nova_dmigrate.rpc import isolation
from tests import base
from tests.lab.broker import HOST_USER, Broker

TOOL = Path(__file__).parents[2] / "devstack" / "tools" / "broker_credentials.py"
INSTANCE = "5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e"
GUEST = isolation.guest_user(INSTANCE)


class BrokerCredentialsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.broker = Broker(())
        self.broker.__enter__()
        self.addCleanup(self.broker.close)
        # The tool calls a program: that of the broker, with the broker's environment
        self.control = self.make_directory() / "rabbitmqctl"
        words = [f"{name}={value}" for name, value in self.broker._environment().items()]
        command = ["env", *words, "/usr/lib/rabbitmq/bin/rabbitmqctl", "--longnames=false"]
        quoted = " ".join(f"'{word}'" for word in command)
        self.control.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
        self.control.chmod(0o755)

    def run_tool(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, TOOL, *arguments],
            env={
                **os.environ,
                "DMIGRATE_RABBITMQCTL": str(self.control),
                "DMIGRATE_BROKER_PASSWORD": "another password",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout

    def authenticated(self, user: str, password: str) -> bool:
        try:
            self.broker.control("authenticate_user", user, password)
        except RuntimeError:
            return False
        return True

    def add(self) -> str:
        text = self.run_tool("add", INSTANCE, "--broker", "broker:5672")
        return text.partition(f"{GUEST}:")[2].partition("@")[0]

    def test_what_is_added_is_good_and_what_is_removed_is_gone(self) -> None:
        first = self.add()
        self.assertTrue(self.authenticated(GUEST, first))
        permissions = self.broker.control("list_permissions", "-p", GUEST)
        for user, wanted in ((GUEST, isolation.GUEST), (HOST_USER, isolation.HOST)):
            line = "\t".join((user, wanted.configure, wanted.write, wanted.read))
            self.assertIn(line, permissions.splitlines())
        second = self.add()
        self.assertFalse(self.authenticated(GUEST, first))
        self.assertTrue(self.authenticated(GUEST, second))

        self.run_tool("services")
        self.assertTrue(self.authenticated(HOST_USER, "another password"))

        self.run_tool("remove-all")
        for kind in ("vhosts", "users"):
            self.assertNotIn("dmigrate", self.broker.control(f"list_{kind}"))

# SPDX-License-Identifier: Apache-2.0
"""The script that makes a guest's agent ready, with a guest that only notes what it is asked."""

import os
import subprocess
import sys

from tests import base
from tests.unit.devstack.node import HERE, ROOT

SCRIPT = ROOT / "devstack" / "tools" / "prepare_guest.sh"
INSTANCE = "5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e"
_SSH = """#!/usr/bin/env bash
for word in "$@"; do shift; if [[ "$word" == *@* ]]; then break; fi; done
echo "$word $*" >>"$GUEST/asked"
if [[ "$*" == "sudo install"* ]]; then cat >"$GUEST/instance.conf"; fi
count=$(grep -cxF "$word $*" "$GUEST/asked")
# The guest is not up at once, nor is the server's memory known
[[ "$*" != true && "$*" != *map* ]] || [[ "$count" -gt "${FAILURES:-1}" ]]
"""


class PrepareGuestTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.guest = self.make_directory()
        for name, text in (("ssh", _SSH), ("sleep", "#!/bin/sh\n")):
            (self.guest / name).write_text(text)
            (self.guest / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{self.guest}:{os.environ['PATH']}",
            "GUEST": str(self.guest),
            "BROKER": "172.24.5.1:5672",
            "DMIGRATE_RABBITMQCTL": f"env BROKER={self.guest} {HERE / 'rabbitmqctl'}",
            "PYTHON": sys.executable,
            "GUEST_KEY": "/home/stack/.ssh/id_rsa",
            "SERVER_ID": INSTANCE,
            "SERVER_ADDRESS": "172.24.5.77",
        }

    def prepare(self) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [SCRIPT],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_the_guest_is_awaited_gets_its_credentials_and_is_asked(self) -> None:
        done = self.prepare()
        self.assertEqual(0, done.returncode, done.stderr)
        asked = [line.partition(" ") for line in (self.guest / "asked").read_text().splitlines()]
        self.assertEqual({"debian@172.24.5.77"}, {who for who, _, _ in asked})
        directory = "/etc/nova-dmigrate/nova-dmigrate-agent.conf.d"
        self.assertEqual(
            [
                *("true", "true"),
                f"sudo install -m 0600 /dev/stdin {directory}/instance.conf",
                "sudo systemctl restart nova-dmigrate-agent",
                *("sudo nova-dmigrate-agent map --summary",) * 2,
            ],
            [what for _, _, what in asked],
        )
        text = (self.guest / "instance.conf").read_text()
        self.assertIn(f"transport_url = rabbit://dmigrate-{INSTANCE}:", text)
        self.assertIn(f"@172.24.5.1:5672/dmigrate-{INSTANCE}", text)

    def test_the_hosts_may_enter_whoever_they_are(self) -> None:
        self.environment["HOSTS_USER"] = "somebody"
        self.assertEqual(0, self.prepare().returncode)
        calls = (self.guest / "calls").read_text()
        self.assertIn("somebody", calls)
        self.assertNotIn("\x1fnova-dmigrate\x1f", calls)

    def test_a_guest_that_never_comes_is_given_up(self) -> None:
        self.environment |= {"FAILURES": "1000000", "PATIENCE": "0"}
        done = self.prepare()
        self.assertEqual(1, done.returncode)
        self.assertIn("not in time: in_guest true", done.stderr)
        self.assertFalse((self.guest / "instance.conf").exists())

    def test_a_broker_that_refuses_is_a_failure(self) -> None:
        self.environment["DMIGRATE_RABBITMQCTL"] = "false"
        self.assertNotEqual(0, self.prepare().returncode)

    def test_what_it_needs_has_to_be_said(self) -> None:
        for name in ("SERVER_ID", "SERVER_ADDRESS", "GUEST_KEY", "BROKER"):
            value = self.environment.pop(name)
            done = self.prepare()
            self.assertNotEqual(0, done.returncode)
            self.assertIn(name, done.stderr)
            self.environment[name] = value

# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-relay as a process: what it is told, what it tells, how it ends."""

import contextlib
import ctypes
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from oslo_config import cfg

from nova_dmigrate import conf, exception
from nova_dmigrate.cmd import relay
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.volumes import VolumeAccess
from tests.base import TestCase
from tests.unit.relay.guest import FakeGuest, received_memory
from tests.unit.relay.wire.support import wait_for

LONG = 60.0
TOKEN = "0123456789abcdef" * 4


class RelayTestCase(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        self.config = self.directory / "nova-dmigrate.conf"
        self.configure(tls=False)

    def configure(self, *, tls: bool) -> None:
        self.config.write_text(
            f"[wire]\ntls = {tls}\nlisten_address = 127.0.0.1\n"
            f"[relay]\nsummary_directory = {self.directory}/summaries\n"
            f"runtime_directory = {self.directory}/runtime\n"
        )

    def session(self, role: str, **changes: Any) -> str:
        session = {
            "role": role,
            "instance": "the-instance",
            "session_id": "the-session",
            "token": TOKEN,
            "qemu_socket": str(self.directory / f"qemu-{role}"),
        }
        return json.dumps({**session, **changes})


class MainTest(RelayTestCase):
    """In this process: what is wrong from the beginning."""

    def main(self, text: str, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        output, errors = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "stdin", io.StringIO(text)),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            mock.patch.object(relay.log, "setup"),
        ):
            status = relay.main([f"--config-file={self.config}", *arguments])
        return status, output.getvalue(), errors.getvalue()

    def assert_wrong(self, text: str, *arguments: str) -> str:
        status, output, errors = self.main(text, *arguments)
        self.assertEqual(2, status)
        told = json.loads(output)
        self.assertEqual(("end", "failed"), (told["event"], told["state"]))
        self.assertIn(told["reason"], errors)
        self.assertNotIn(TOKEN, errors)
        return errors

    def test_a_session_that_is_no_json(self) -> None:
        self.assertIn("is not JSON", self.assert_wrong("{"))
        self.assertIn("is not JSON", self.assert_wrong(""))

    def test_a_session_with_a_wrong_key(self) -> None:
        errors = self.assert_wrong(self.session("destination", port="x"))
        self.assertIn("the-instance", errors)
        self.assertIn("port", errors)

    def test_a_session_in_the_clear_where_the_host_wants_tls(self) -> None:
        self.configure(tls=True)
        errors = self.assert_wrong(self.session("destination"))
        self.assertIn("does not migrate in the clear", errors)

    def test_certificates_that_are_missing(self) -> None:
        self.configure(tls=True)
        text = self.session("destination", tls={"peer_name": "x", "ca": "/does/not/exist"})
        status, output, _ = self.main(text)
        self.assertEqual(1, status)
        self.assertEqual("failed", json.loads(output)["state"])

    def test_a_session_file_that_is_missing(self) -> None:
        self.assertIn("missing", self.assert_wrong("", f"--session={self.directory}/missing"))

    def test_an_option_that_is_unknown_or_out_of_its_limits(self) -> None:
        with contextlib.suppress(SystemExit):
            self.assertEqual(2, self.main("", "--nonsense")[0])
        self.config.write_text("[wire]\ntls = false\n[relay]\nchannels = 1000\n")
        errors = self.assert_wrong(self.session("destination"))
        self.assertIn("channels", errors)

    def test_a_destination_that_is_not_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        status, output, _ = self.main(self.session("source", host="127.0.0.1", port=port))
        self.assertEqual(1, status)
        event = json.loads(output)
        self.assertEqual(("end", "failed"), (event["event"], event["state"]))
        self.assertIn("cannot connect", event["reason"])
        self.assertEqual([], list((self.directory / "runtime").iterdir()))


class SettingsTest(TestCase):
    def config(self, **changes: Any) -> cfg.ConfigOpts:
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config([], default_config_files=[], default_config_dirs=[])
        for name, value in changes.items():
            group, option = name.split("__")
            config.set_override(option, value, group)
        return config

    def test_the_defaults_of_options_and_of_settings_are_the_same(self) -> None:
        self.assertEqual(RelaySettings(), relay.settings_from(self.config()))

    def test_options_have_units_and_settings_have_bytes_and_seconds(self) -> None:
        settings = relay.settings_from(
            self.config(
                relay__window_size=32,
                relay__batch_size=512,
                relay__queue_delay=20,
                relay__network_bandwidth=1.5,
                volume__read_size=256,
                volume__bandwidth=2,
                volume__timeout=30,
                volume__rbd_user="reader",
                volume__rbd_configuration="/c",
                volume__rbd_keyring="/k",
            )  # fmt: skip
        )
        self.assertEqual(32 << 20, settings.window_size)
        self.assertEqual(512 << 10, settings.batch_size)
        self.assertEqual(0.02, settings.queue_delay)
        self.assertEqual(1.5 * (1 << 20), settings.network_bandwidth)
        self.assertEqual(256 << 10, settings.volume_read_size)
        self.assertEqual(2 << 20, settings.volume_bandwidth)
        self.assertEqual(VolumeAccess(30, "reader", "/c", "/k"), settings.volume_access)

    def test_relays_are_given_keys_where_the_host_says_so_and_has_a_libvirt(self) -> None:
        without: list[dict[str, Any]] = [{}, {"host__volume_keys": True, "host__libvirt_uri": ""}]
        for changes in without:
            self.assertIsNone(relay.settings_from(self.config(**changes)).volume_access.keys)
        nowhere = "qemu+unix:///system?socket=/nonexistent"
        config = self.config(host__volume_keys=True, host__libvirt_uri=nowhere)
        keys = relay.settings_from(config).volume_access.keys
        assert keys is not None
        error = self.assertRaises(exception.HypervisorError, keys, "6f1d2c3b")
        self.assertIn("secret 6f1d2c3b: ", str(error))

    def test_the_hosts_files_are_the_sessions_defaults(self) -> None:
        defaults = relay.defaults_from(self.config(wire__ca_file="/ca", wire__port=5))
        self.assertTrue(defaults.tls)
        self.assertEqual(("/ca", 5), (defaults.ca, defaults.listen_port))


class ProcessTest(RelayTestCase):
    """As processes of their own."""

    def start(self, text: str) -> "subprocess.Popen[str]":
        top = Path(__file__).parents[3]
        with (self.directory / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nova_dmigrate.cmd.relay", f"--config-file={self.config}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=top,
                env={**os.environ, "PYTHONPATH": str(top)},
            )
        self.addCleanup(self.end, process)
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        return process

    def end(self, process: "subprocess.Popen[str]") -> None:
        process.kill()
        process.wait(LONG)
        assert process.stdout is not None
        process.stdout.close()

    def event(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        self.assertTrue(line, (self.directory / "log").read_text())
        event: dict[str, Any] = json.loads(line)
        return event

    def test_a_migration_through_two_processes(self) -> None:
        guest = FakeGuest(1, ram_pages=512, mapped=0)
        stream = guest.stream()
        destination = self.start(self.session("destination"))
        ready = self.event(destination)
        self.assertEqual(("ready", "127.0.0.1"), (ready["event"], ready["host"]))
        with socket.socket(socket.AF_UNIX) as recorder:
            recorder.bind(str(self.directory / "qemu-destination"))
            recorder.listen()
            source = self.start(self.session("source", host=ready["host"], port=ready["port"]))
            self.assertEqual({"event": "ready"}, self.event(source))
            recorded = bytearray()

            def record() -> None:
                qemu, _ = recorder.accept()
                with qemu:
                    while data := qemu.recv(1 << 20):
                        recorded.extend(data)

            thread = threading.Thread(target=record, daemon=True)
            thread.start()
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(self.directory / "qemu-source"))
                qemu.sendall(stream)
            thread.join(LONG)
        for process in (source, destination):
            self.assertEqual(
                {"event": "end", "state": "delivered", "reason": None}, self.event(process)
            )
            self.assertEqual(0, process.wait(LONG))
        memory, _ = received_memory(bytes(recorded), guest.ram_pages)
        self.assertTrue((memory == guest.memory).all())
        self.assertEqual(
            ["the-session-destination.json", "the-session-source.json"],
            sorted(path.name for path in (self.directory / "summaries").iterdir()),
        )
        self.assert_nothing_left()

    def test_a_signal_cancels_both_ends_wherever_it_arrives(self) -> None:
        for number, first in ((signal.SIGTERM, "source"), (signal.SIGINT, "destination")):
            destination = self.start(self.session("destination"))
            ready = self.event(destination)
            source = self.start(self.session("source", host=ready["host"], port=ready["port"]))
            self.event(source)
            processes = {"source": source, "destination": destination}
            processes[first].send_signal(number)
            states = {name: self.event(process)["state"] for name, process in processes.items()}
            statuses = {name: process.wait(LONG) for name, process in processes.items()}
            self.assertEqual(("cancelled", 3), (states[first], statuses[first]))
            if first == "source":
                self.assertEqual(("cancelled", 3), (states["destination"], statuses["destination"]))
            else:
                self.assertEqual(("failed", 1), (states["source"], statuses["source"]))
            self.assert_nothing_left()

    def test_a_signal_counts_whichever_thread_takes_it(self) -> None:
        """The main thread waits for the others then, and does not come back to Python."""
        destination = self.start(self.session("destination"))
        self.event(destination)
        threads = Path(f"/proc/{destination.pid}/task")
        wait_for(lambda: len(list(threads.iterdir())) > 1)
        main = threads / str(destination.pid) / "status"
        before = ""
        while (status := main.read_text()) != before:  # its count of context switches is in it
            before = status
            time.sleep(0.3)
        other = max(int(thread.name) for thread in threads.iterdir())
        self.assertNotEqual(destination.pid, other)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.tgkill(destination.pid, other, signal.SIGTERM):
            self.fail(os.strerror(ctypes.get_errno()))
        self.assertEqual("cancelled", self.event(destination)["state"])
        self.assertEqual(3, destination.wait(LONG))

    def test_a_destination_that_waits_for_its_source_ends_with_a_signal(self) -> None:
        destination = self.start(self.session("destination"))
        self.event(destination)
        destination.terminate()
        self.assertEqual("cancelled", self.event(destination)["state"])
        self.assertEqual(3, destination.wait(LONG))
        self.assert_nothing_left()

    def test_a_killed_peer_ends_the_other_one(self) -> None:
        for killed in ("source", "destination"):
            destination = self.start(self.session("destination"))
            ready = self.event(destination)
            source = self.start(self.session("source", host=ready["host"], port=ready["port"]))
            self.event(source)
            victim, other = (source, destination) if killed == "source" else (destination, source)
            victim.kill()
            self.assertEqual("failed", self.event(other)["state"])
            self.assertEqual(1, other.wait(LONG))

    def assert_nothing_left(self) -> None:
        """No socket stays, and the token is nowhere."""
        left = [path for path in self.directory.rglob("*") if path.is_socket()]
        self.assertEqual([], [path for path in left if path.name != "qemu-destination"])
        for path in self.directory.rglob("*"):
            if path.is_file():
                self.assertNotIn(TOKEN, path.read_text(), path)

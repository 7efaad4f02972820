# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate: what it prints where, and its exit status."""

import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fixtures
import yaml
from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.cmd.cli import app
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration.history import History
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.migration.summary import MigrationSummary
from tests import base
from tests.unit.migration.summaries import MIB, ORDINARY, RELAYED, series

ROOT = Path(__file__).parents[3]
URI = "qemu+tls://compute2/system"
NOWHERE = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"

# The program, with a migration that lasts until it is cancelled
_UNTIL_INTERRUPTED = """
import dataclasses, sys, warnings
warnings.simplefilter("ignore")
from nova_dmigrate.cmd.cli import app
from nova_dmigrate.migration import service
from nova_dmigrate.migration.progress import Progress
from tests.unit.migration.summaries import RELAYED

def migrate(request, config, on_progress, cancelled):
    on_progress(Progress("migrating"))
    if cancelled.wait(60):
        print("all is put back", flush=True, file=open(config.config_file[0] + ".told", "w"))
        return dataclasses.replace(RELAYED, state="cancelled", error="interrupted")

service.migrate = migrate
sys.exit(app.main())
"""


# What a program that is started in a terminal finds
_OF_ITS_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY)\n"
_AS_NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"


class CommandLineTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        directory = self.make_directory()
        self.history = History(directory / "history")
        self.config = directory / "nova-dmigrate.conf"
        self.configure()
        self.called: list[MigrationRequest] = []
        root = logging.getLogger()
        self.useFixture(fixtures.MonkeyPatch("logging.root.handlers", list(root.handlers)))
        self.addCleanup(root.setLevel, root.level)

    def configure(self, more: str = "") -> None:
        self.config.write_text(
            f"[migration]\nhistory_directory = {self.config.parent / 'history'}\n{more}"
        )

    def run_command(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        output, errors = io.StringIO(), io.StringIO()
        self.useFixture(fixtures.MonkeyPatch("sys.stdout", output))
        with fixtures.MonkeyPatch("sys.stderr", errors):
            status = app.main(
                ["--config-file", str(self.config), *arguments], stdout=output, stderr=errors
            )
        return status, output.getvalue(), errors.getvalue()

    def orchestrate(self, outcome: MigrationSummary | Exception | list[Finding]) -> None:
        """Have the orchestration come to an outcome."""

        def migrate(
            request: MigrationRequest,
            config: cfg.ConfigOpts,
            on_progress: Callable[[Progress], None],
            cancelled: threading.Event,
        ) -> Any:
            on_progress(Progress("migrating", 3.0, wire_bytes=5 * MIB))
            return check(request, config)

        def check(request: MigrationRequest, config: cfg.ConfigOpts) -> Any:
            self.assertEqual(
                "rabbit://", config.transport_url
            )  # oslo.messaging's options are there
            self.called.append(request)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        for name, function in (("migrate", migrate), ("check", check)):
            target = f"nova_dmigrate.migration.service.{name}"
            self.useFixture(fixtures.MonkeyPatch(target, function))


class MigrateTest(CommandLineTest):
    def test_the_result_goes_to_standard_output_and_the_rest_to_standard_error(self) -> None:
        self.orchestrate(dataclasses.replace(RELAYED, mapping_s=1.5))
        status, output, errors = self.run_command("migrate", "db1", URI, "-f", "json")
        self.assertEqual(0, status, errors)
        told = json.loads(output)
        self.assertEqual(RELAYED.id, told["id"])
        self.assertEqual((87, 930 * MIB), (told["downtime_ms"], told["volume_bytes"]))
        self.assertEqual(1.5, told["mapping_s"])
        self.assertEqual(RELAYED.phases, told["phases"])
        self.assertEqual("cached-disk", told["findings"][0]["code"])
        self.assertIn("db1: 3 s, migrating, network 5.0 MiB", errors)
        self.assertEqual(RELAYED.sentence(), errors.splitlines()[-1])

    def test_a_table_is_for_people(self) -> None:
        self.orchestrate(RELAYED)
        output = self.run_command("migrate", "db1", URI)[1]
        self.assertIn("| volume_bytes     | 930.0 MiB", output)
        self.assertIn("bulk: 9.8 s", output)
        self.assertIn("note: vdb is cached by the host [cached-disk]", output)

    def test_quiet_is_the_result_alone(self) -> None:
        self.orchestrate(RELAYED)
        status, output, errors = self.run_command(
            "-q", "migrate", "db1", URI, "-f", "value", "-c", "state"
        )
        self.assertEqual((0, "completed\n", ""), (status, output, errors))

    def test_an_ordinary_migration_is_well_too_and_tells_why(self) -> None:
        self.orchestrate(ORDINARY)
        status, output, errors = self.run_command("migrate", "db1", URI, "-f", "yaml")
        self.assertEqual(0, status)
        self.assertEqual("agent-unreachable", yaml.safe_load(output)["fallback_reason"])
        self.assertIn("because the agent of db1 does not answer", errors)

    def test_a_failure_or_cancellation_is_status_1(self) -> None:
        for state in ("failed", "cancelled"):
            self.orchestrate(dataclasses.replace(RELAYED, state=state, error="the disk burns"))
            status, output, errors = self.run_command("migrate", "db1", URI, "-f", "json")
            self.assertEqual((1, state), (status, json.loads(output)["state"]))
            self.assertIn("the disk burns", errors)

    def test_an_error_is_status_1_and_its_sentence(self) -> None:
        self.orchestrate(exception.MigrationError(instance="db1", reason="there is none"))
        self.assertEqual(
            (1, "", "Migration of db1: there is none\n"),
            self.run_command("-q", "migrate", "db1", URI),
        )

    def test_a_libvirt_that_is_not_there_is_status_1(self) -> None:
        status, output, errors = self.run_command("migrate", "db1", URI, "--connect", NOWHERE)
        self.assertEqual((1, ""), (status, output))
        self.assertIn("/nonexistent/libvirt-sock", errors)
        self.assertNotIn("Traceback", errors)

    def test_every_option_reaches_the_orchestration(self) -> None:
        self.orchestrate(RELAYED)
        self.run_command(
            *("migrate", "db1", URI, "--connect", "qemu:///session", "--mode", "required"),
            *("--max-downtime", "50", "--bandwidth", "1.5", "--volume-bandwidth", "2"),
            *("--wait", "7", "--auto-converge", "--post-copy", "--tls", "--agent", "broker"),
            *("--instance", "an-id", "--source-host", "a", "--destination-host", "b"),
            *("--migration-address", "192.0.2.1"),
        )
        self.assertEqual(
            MigrationRequest(
                domain="db1",
                destination_uri=URI,
                connect_uri="qemu:///session",
                instance="an-id",
                mode=Mode.REQUIRED,
                max_downtime_ms=50,
                network_bandwidth=1572864,
                volume_bandwidth=2097152,
                auto_converge=True,
                post_copy=True,
                tls=True,
                agent_transport=AgentTransport.BROKER,
                source_host="a",
                destination_host="b",
                migration_address="192.0.2.1",
                wait_seconds=7.0,
            ),
            self.called[0],
        )

    def test_what_is_not_said_is_left_to_the_configuration(self) -> None:
        self.useFixture(fixtures.EnvironmentVariable("LIBVIRT_DEFAULT_URI", "qemu:///other"))
        self.configure("agent_transport = broker\n")
        self.orchestrate(RELAYED)
        self.run_command("migrate", "db1", URI)
        self.assertEqual(
            MigrationRequest("db1", URI, "qemu:///other", agent_transport=AgentTransport.BROKER),
            self.called[0],
        )


class CheckTest(CommandLineTest):
    def test_findings_are_listed_and_a_problem_is_status_1(self) -> None:
        well = Finding("host", Severity.OK, "the service answers")
        bad = Finding("no-agent-port", Severity.PROBLEM, "there is no port")
        self.orchestrate([well])
        status, output, _ = self.run_command("check", "db1", URI, "-f", "json")
        self.assertEqual(0, status)
        self.assertEqual(
            [{"severity": "ok", "code": "host", "message": "the service answers"}],
            json.loads(output),
        )
        self.orchestrate([well, bad])
        status, output, _ = self.run_command("check", "db1", URI)
        self.assertEqual(1, status)
        self.assertIn("| problem  | no-agent-port | there is no port", output)

    def test_a_host_alone_can_be_checked(self) -> None:
        self.orchestrate([])
        self.assertEqual(0, self.run_command("check")[0])
        self.assertEqual(("", ""), (self.called[0].domain, self.called[0].destination_uri))


class HistoryTest(CommandLineTest):
    def setUp(self) -> None:
        super().setUp()
        full = dataclasses.replace(RELAYED, series={"source": tuple(series())})
        self.history.add(full)
        self.history.add(ORDINARY)

    def test_the_history_lists_the_newest_first(self) -> None:
        status, output, _ = self.run_command("history", "-f", "json")
        told = json.loads(output)
        self.assertEqual((0, [ORDINARY.id, RELAYED.id]), (status, [each["id"] for each in told]))
        output = self.run_command("history", "--limit", "1", "-f", "value", "-c", "id")[1]
        self.assertEqual(ORDINARY.id + "\n", output)

    def test_a_broken_file_costs_a_warning(self) -> None:
        path = self.config.parent / "history" / "20261125-170301-ffffff.json"
        path.write_text("{")
        status, output, errors = self.run_command("history", "-f", "value", "-c", "id")
        self.assertEqual((0, 2), (status, len(output.splitlines())))
        self.assertIn("20261125-170301-ffffff.json is broken", errors)

    def test_one_migration_is_shown(self) -> None:
        status, output, _ = self.run_command("show", RELAYED.id, "-f", "json")
        self.assertEqual((0, 1204), (status, json.loads(output)["misses"]))
        status, output, errors = self.run_command("show", "20261125-170301-000000")
        self.assertEqual((1, ""), (status, output))
        self.assertIn("has no migration 20261125-170301-000000", errors)

    def test_a_report_is_one_file(self) -> None:
        path = self.make_directory() / "report.html"
        status, output, _ = self.run_command(
            "report", RELAYED.id, ORDINARY.id, "--output", str(path)
        )
        self.assertEqual((0, f"{path}\n"), (status, output))
        self.assertIn(RELAYED.sentence(), "".join(ElementTree.parse(path).getroot().itertext()))
        missing = path.parent / "missing" / "report.html"
        status, _, errors = self.run_command("report", RELAYED.id, "--output", str(missing))
        self.assertEqual(1, status)
        self.assertIn("cannot be written", errors)


class UsageTest(CommandLineTest):
    def test_wrong_usage_is_status_2_before_anything_is_done(self) -> None:
        self.orchestrate(RELAYED)
        for arguments in (
            [],
            ["nonsense"],
            ["migrate"],
            ["migrate", "db1"],
            ["migrate", "", URI],
            ["migrate", "db1", URI, "--mode", "magic"],
            ["migrate", "db1", URI, "--max-downtime", "-1"],
            ["migrate", "db1", URI, "--max-downtime", "0"],
            ["migrate", "db1", URI, "--max-downtime", "1.5"],
            ["migrate", "db1", URI, "--bandwidth", "-1"],
            ["migrate", "db1", URI, "--bandwidth", "nan"],
            ["migrate", "db1", URI, "--wait", "inf"],
            ["migrate", "db1", URI, "-f", "xml"],
            ["migrate", "db1", URI, "-c", "nonsense"],
            ["history", "--limit", "0"],
            ["report"],
            ["show"],
        ):
            self.assertEqual(2, self.run_command(*arguments)[0], arguments)
        self.assertEqual([], self.called)

    def test_wrong_configuration_is_status_2_and_told(self) -> None:
        self.orchestrate(RELAYED)
        self.configure("agent_transport = pigeon\n")
        status, output, errors = self.run_command("migrate", "db1", URI)
        self.assertEqual((2, ""), (status, output))
        self.assertIn("agent_transport", errors)
        self.assertEqual([], self.called)
        self.config.unlink()
        self.assertEqual(2, self.run_command("history")[0])

    def test_help_is_about_the_command_that_is_named(self) -> None:
        status, output, _ = self.run_command("migrate", "--help")
        self.assertEqual(0, status)
        self.assertIn("--max-downtime", output)
        cancels = "Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) cancels it"
        self.assertIn(cancels, " ".join(output.split()))
        self.assertIn("migrate", self.run_command("--help")[1])


class ProcessTest(CommandLineTest):
    """The program as a process of its own."""

    def start(
        self, *arguments: str, code: tuple[str, ...], **options: Any
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *code, "--config-file", str(self.config), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def run_process(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments, code=("-m", "nova_dmigrate.cmd.cli.app"))
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def test_table_json_and_yaml_say_the_same(self) -> None:
        self.history.add(RELAYED)
        status, table, errors = self.run_process("history")
        self.assertEqual((0, ""), (status, errors))
        self.assertIn(RELAYED.id, table)
        from_json = json.loads(self.run_process("history", "-f", "json")[1])
        from_yaml = yaml.safe_load(self.run_process("history", "-f", "yaml")[1])
        self.assertEqual(from_json, from_yaml)
        self.assertEqual(620 * MIB, from_json[0]["wire_bytes"])

    def test_exit_statuses(self) -> None:
        self.assertEqual(0, self.run_process("history")[0])
        self.assertEqual(1, self.run_process("show", RELAYED.id)[0])
        self.assertEqual(1, self.run_process("migrate", "db1", URI, "--connect", NOWHERE)[0])
        self.assertEqual(2, self.run_process("migrate")[0])
        status, output, errors = self.run_process()
        self.assertEqual((2, ""), (status, output))
        self.assertIn("which command?", errors)

    def test_sigterm_ctrl_c_and_sighup_let_the_orchestration_cancel(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process = self.start(
                *("migrate", "db1", URI, "-f", "json"), code=("-c", _UNTIL_INTERRUPTED)
            )
            assert process.stderr is not None
            self.assertIn("migrating", process.stderr.readline())
            process.send_signal(number)
            output, errors = process.communicate(timeout=30)
            self.assertEqual(1, process.returncode, errors)
            self.assertEqual("cancelled", json.loads(output)["state"])
            self.assertIn("was cancelled", errors)

    def test_a_terminal_that_is_gone_lets_the_orchestration_cancel(self) -> None:
        ours, terminal = os.openpty()
        self.addCleanup(os.close, terminal)
        with open(ours, "rb", buffering=0) as seen:
            process = self.start(
                *("migrate", "db1", URI),
                code=("-c", _OF_ITS_TERMINAL + _UNTIL_INTERRUPTED),
                **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
                start_new_session=True,
            )
            told = b""
            while b"migrating" not in told:
                told += seen.read(4096)
        # All that it writes from here on fails
        process.wait(30)
        self.assertEqual("all is put back\n", Path(f"{self.config}.told").read_text())

    def test_nohup_lets_it_go_on_without_a_terminal(self) -> None:
        process = self.start(
            *("migrate", "db1", URI, "-f", "json"),
            code=("-c", _AS_NOHUP + _UNTIL_INTERRUPTED),
        )
        assert process.stderr is not None
        self.assertIn("migrating", process.stderr.readline())
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
        self.assertTrue(int(ignored.split()[1], 16) >> signal.SIGHUP - 1 & 1, ignored)

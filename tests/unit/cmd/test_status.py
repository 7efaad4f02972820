# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-status on hosts where things are amiss, each of them for real.

Host services and libvirt that answer: tests/integration/test_status.py.
"""

import configparser
import json
import os
import pwd
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import fixtures
from oslo_upgradecheck.upgradecheck import Code, Result

from nova_dmigrate.migration.history import History
from tests import base
from tests.unit.migration.summaries import ORDINARY, RELAYED
from tests.unit.relay.wire.certificates import Authority
from tools.nova_tests import plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.cmd.checks import configuration, hypervisor, nova, services
    from nova_dmigrate.cmd.checks.base import CheckedHost
    from nova_dmigrate.virt.configuration import NEWEST_NOVA, OLDEST_NOVA

ROOT = Path(__file__).parents[3]
NOWHERE = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"
#: Of this machine nobody listens at this port.
NO_BROKER = "rabbit://u:p@127.0.0.1:1/v"


class StatusTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        # Where oslo.config looks first for nova.conf: the machine's own is not looked at
        self.useFixture(fixtures.EnvironmentVariable("HOME", str(self.directory)))

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def host(self, text: str = "", nova: str | None = None, **more: object) -> CheckedHost:
        """A host with these configurations; without Nova if that has none."""
        own = self.write("own.conf", text)
        files = [] if nova is None else [str(self.write("its-nova.conf", nova))]
        return CheckedHost([f"--config-file={own}"], files, **more)  # type: ignore[arg-type]

    def assert_told(
        self, code: Code, words: str, check: Callable[[CheckedHost], Result], host: CheckedHost
    ) -> None:
        result = check(host)
        self.assertEqual((code, True), (result.code, words in str(result.details)), result.details)

    def have_nova(self, version: str) -> None:
        """Have a package "nova" of that version, and no other one, be installed."""
        site = self.directory / "site"
        shutil.rmtree(site, ignore_errors=True)
        metadata = site / f"nova-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: nova\nVersion: {version}\n")
        self.useFixture(fixtures.MonkeyPatch("sys.path", [str(site), *sys.path]))


class ConfigurationTest(StatusTestCase):
    def test_options_that_can_be_used(self) -> None:
        host = self.host("[host]\nname = one\n")
        self.assert_told(Code.SUCCESS, "own.conf: host one", configuration.options, host)

    def test_what_cannot_be_is_told_with_its_option(self) -> None:
        for text, words in (
            ("[relay]\nchannels = 17\n", "[relay]channels"),
            ("[wire]\ntls = perhaps\n", "[wire]tls"),
            ("[host]\nqemu_user = no such user\n", "no such user"),
            ("[host]\nmemory_limit = 100\n", "[host]memory_limit"),
            ("no section\n", "own.conf"),
        ):
            self.assert_told(Code.FAILURE, words, configuration.options, self.host(text))

    def test_files_that_cannot_be_read_are_told(self) -> None:
        missing = str(self.directory / "missing.conf")
        host = CheckedHost([f"--config-file={missing}"])
        self.assert_told(Code.FAILURE, missing, configuration.options, host)
        binary = self.directory / "binary.conf"
        binary.write_bytes(b"[host]\nname = \xff\xfe\n")
        host = CheckedHost([f"--config-file={binary}"])
        self.assertEqual(Code.FAILURE, configuration.options(host).code)

    def test_certificates_are_those_that_relays_use(self) -> None:
        authority = Authority(self.directory)
        certificate, key = authority.issue("one")
        _, other_key = authority.issue("two")
        text = f"[wire]\nca_file = {authority.certificate}\ncertificate_file = {certificate}\n"
        check = configuration.certificates
        self.assert_told(Code.SUCCESS, certificate, check, self.host(f"{text}key_file = {key}\n"))
        for wrong in (other_key, "/nonexistent/key"):
            host = self.host(f"{text}key_file = {wrong}\n")
            self.assert_told(Code.FAILURE, wrong, check, host)
        self.assert_told(Code.SUCCESS, "[wire]tls", check, self.host("[wire]\ntls = off\n"))

    def test_migrations_that_cannot_be_read_are_counted(self) -> None:
        past = self.directory / "history"
        host = self.host(f"[migration]\nhistory_directory = {past}\n")
        self.assert_told(Code.SUCCESS, "0 migrations", configuration.history, host)
        for summary in (RELAYED, ORDINARY):
            path = History(past).add(summary)
        self.assert_told(Code.SUCCESS, "2 migrations", configuration.history, host)
        path.write_bytes(path.read_bytes()[:100])
        self.assert_told(Code.WARNING, "1 of 2", configuration.history, host)
        self.assert_told(Code.WARNING, str(path), configuration.history, host)

    def test_a_history_that_is_no_directory_is_told(self) -> None:
        file = self.write("file", "")
        host = self.host(f"[migration]\nhistory_directory = {file}\n")
        self.assert_told(Code.FAILURE, str(file), configuration.history, host)


class OtherProcessesTest(StatusTestCase):
    def test_a_broker_that_is_not_there_is_told(self) -> None:
        text = f"[DEFAULT]\ntransport_url = {NO_BROKER}\n[host]\nname = one\n"
        words = "Host one: no broker can be reached"
        self.assert_told(Code.FAILURE, words, services.own, self.host(text))
        self.assert_told(Code.WARNING, words, services.others, self.host(text, peers=["two"]))
        self.assert_told(Code.SUCCESS, "--peer", services.others, self.host(text))

    def test_a_libvirt_that_is_not_there_or_has_no_qemu_is_told(self) -> None:
        for uri, words in ((NOWHERE, NOWHERE), ("test:///default", "no QEMU")):
            for host in (self.host(connect=uri), self.host(f"[host]\nlibvirt_uri = {uri}\n")):
                self.assert_told(Code.FAILURE, words, hypervisor.versions, host)

    def test_a_host_without_libvirt_is_not_asked_for_one(self) -> None:
        host = self.host("[host]\nlibvirt_uri =\n")
        self.assert_told(Code.SUCCESS, "[host]libvirt_uri", hypervisor.versions, host)


class NovaTest(StatusTestCase):
    OURS = "[DEFAULT]\nhost = one\ncompute_driver = dmigrate.DMigrateDriver\n"
    URL = "transport_url = rabbit://a:b@broker/services\n"
    OWN = f"[DEFAULT]\n{URL}[host]\nname = one\n"

    def test_where_there_is_no_nova_nothing_is_amiss(self) -> None:
        for check in (nova.release, nova.driver, nova.own_options, nova.directories):
            self.assert_told(Code.SUCCESS, "no Nova", check, self.host())

    def test_releases_that_the_driver_is_for(self) -> None:
        for version, code in (
            (f"{OLDEST_NOVA - 1}.2.0", Code.FAILURE),
            (f"{OLDEST_NOVA}.0.0", Code.SUCCESS),
            (f"{NEWEST_NOVA}.1.0.dev3", Code.SUCCESS),
            (f"{NEWEST_NOVA + 1}.0.0.0rc1", Code.WARNING),
        ):
            self.have_nova(version)
            self.assert_told(code, f"Nova {version}", nova.release, self.host())

    def test_they_are_those_that_are_tried_and_that_the_package_wants(self) -> None:
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        self.assertIn(f"nova>={OLDEST_NOVA}.0.0 ", setup["extras"]["nova"])
        self.assertEqual(max(plan.RELEASES), NEWEST_NOVA)
        self.assertIn(OLDEST_NOVA, plan.RELEASES)

    def test_a_driver_without_its_nova_is_told(self) -> None:
        host = self.host(self.OWN, self.OURS)
        self.assert_told(Code.WARNING, sys.prefix, nova.release, host)
        self.assert_told(Code.SUCCESS, "compute_driver", nova.driver, host)

    def test_another_driver_is_told(self) -> None:
        for text, words in (
            ("[DEFAULT]\ncompute_driver = libvirt.LibvirtDriver\n", "is libvirt.LibvirtDriver"),
            ("[DEFAULT]\n", "is not set"),
        ):
            self.assert_told(Code.WARNING, words, nova.driver, self.host(self.OWN, text))

    def test_what_nova_compute_reads_by_default_counts(self) -> None:
        (self.directory / ".nova").mkdir()
        self.write(".nova/nova.conf", self.OURS)
        self.assert_told(Code.SUCCESS, "dmigrate", nova.driver, self.host(self.OWN))
        # As distributions have it
        self.write(".nova/nova-compute.conf", "[DEFAULT]\ncompute_driver = libvirt.LibvirtDriver\n")
        self.assert_told(Code.WARNING, "libvirt.LibvirtDriver", nova.driver, self.host(self.OWN))

    def test_a_nova_conf_that_cannot_be_read_is_told(self) -> None:
        status, told = self.run_check(self.OWN, "no section\n")
        self.assertEqual(1, told["Configuration of Nova"]["result"])
        self.assertIn("its-nova.conf", told["Configuration of Nova"]["details"])
        self.assertEqual(0, told["Configuration"]["result"])
        self.assertNotEqual(0, status)

    def test_options_of_ours_in_nova_conf_are_told(self) -> None:
        own = f"[dmigrate]\nconfig_file = {self.directory}/own.conf\n"
        for text, code, words in (
            (f"{self.OURS}{own}", Code.SUCCESS, "default_policy"),
            (f"{self.OURS}[dmigrate]\ndefault_policy = always\n", Code.FAILURE, "default_policy"),
            (f"{self.OURS}[dmigrate]\npolicy_from_metadata = x\n", Code.FAILURE, "metadata"),
            (f"{self.OURS}[dmigrate]\nconfig_file = /no/such.conf\n", Code.FAILURE, "/no/such"),
            (f"{self.OURS.replace('one', 'two')}{own}", Code.FAILURE, "[host]name"),
            # The driver's files say nothing of a broker, and Nova's is another
            (f"{self.OURS}transport_url = rabbit://x/\n", Code.FAILURE, "[DEFAULT]transport_url"),
        ):
            self.assert_told(code, words, nova.own_options, self.host(self.OWN, text))

    def test_nova_compute_has_to_reach_its_directories(self) -> None:
        """As a user of its own, below a directory of the host service's."""
        base.require(None if os.geteuid() == 0 else "only root can act as nova-compute's user")
        self.directory.chmod(0o711)
        nobody = pwd.getpwnam("nobody")
        novas = self.directory / "nova"
        novas.mkdir()
        os.chown(novas, nobody.pw_uid, nobody.pw_gid)
        state = self.directory / "state"
        state.mkdir(mode=0o711)
        own = self.directory / "own.conf"
        host = self.host(
            f"{self.OWN}state_directory = {state}\n"
            f"[migration]\nhistory_directory = {state}/history\n",
            f"{self.OURS}state_path = {novas}\n[dmigrate]\nconfig_file = {own}\n",
        )

        def check(code: Code, words: str) -> None:
            self.assert_told(code, words, nova.directories, host)

        own.chmod(0o600)
        check(Code.FAILURE, f"cannot read {own}")
        own.chmod(0o640)
        os.chown(own, 0, nobody.pw_gid)
        check(Code.FAILURE, f"[host]state_directory: nova-compute, as user {nobody.pw_uid}")
        for name in ("maps", "history"):
            (state / name).mkdir(mode=0o700)
        os.chown(state / "maps", nobody.pw_uid, nobody.pw_gid)
        check(Code.FAILURE, "[migration]history_directory")
        os.chown(state / "history", nobody.pw_uid, nobody.pw_gid)
        check(Code.SUCCESS, str(state / "maps"))
        state.chmod(0o700)
        check(Code.FAILURE, "[host]state_directory")

    def test_nova_compute_has_to_read_its_key_for_the_broker(self) -> None:
        base.require(None if os.geteuid() == 0 else "only root can act as nova-compute's user")
        self.directory.chmod(0o711)
        key, own = self.write("client.key", "a key"), self.directory / "own.conf"
        nobody = pwd.getpwnam("nobody").pw_uid
        for ssl, mode, code in (
            ("true", 0o600, Code.FAILURE),
            ("true", 0o644, Code.SUCCESS),
            ("false", 0o600, Code.SUCCESS),
        ):
            key.chmod(mode)
            novas = self.make_directory()
            os.chown(novas, nobody, -1)
            host = self.host(
                f"{self.OWN}state_directory = {novas}\n"
                f"[migration]\nhistory_directory = {novas}/history\n"
                f"[oslo_messaging_rabbit]\nssl = {ssl}\nssl_key_file = {key}\n",
                f"{self.OURS}state_path = {novas}\n[dmigrate]\nconfig_file = {own}\n",
            )
            own.chmod(0o644)
            words = str(key) if code is Code.FAILURE else str(novas)
            self.assert_told(code, words, nova.directories, host)

    def test_whose_nova_compute_is_may_not_be_known(self) -> None:
        for path in (f"{self.directory}/none", "$pybasedir/state"):
            host = self.host(self.OWN, f"{self.OURS}state_path = {path}\n")
            self.assert_told(Code.WARNING, "state_path", nova.directories, host)

    def test_files_in_the_directory_beside_ours_are_nova_computes_too(self) -> None:
        base.require(None if os.geteuid() == 0 else "only root can act as nova-compute's user")
        self.directory.chmod(0o711)
        own, more = self.directory / "own.conf", self.directory / "own.conf.d"
        more.mkdir(mode=0o755)
        secrets = more / "secrets.conf"
        secrets.write_text("[migration]\nlease = 17\n")
        novas = self.make_directory()
        os.chown(novas, pwd.getpwnam("nobody").pw_uid, -1)
        host = self.host(
            f"{self.OWN}state_directory = {novas}\n[migration]\nhistory_directory = {novas}/h\n",
            f"{self.OURS}state_path = {novas}\n[dmigrate]\nconfig_file = {own}\n",
        )
        own.chmod(0o644)
        for path, mode, code in (
            (secrets, 0o600, Code.FAILURE),
            (secrets, 0o644, Code.SUCCESS),
            (more, 0o700, Code.FAILURE),
        ):
            path.chmod(mode)
            words = f"cannot read {path}" if code is Code.FAILURE else str(novas)
            self.assert_told(code, words, nova.directories, host)

    def test_without_our_driver_nova_needs_no_directory(self) -> None:
        host = self.host(self.OWN, "[DEFAULT]\n")
        self.assert_told(Code.SUCCESS, "does not have our driver", nova.directories, host)

    def test_no_password_is_told(self) -> None:
        text = f"{self.OURS}transport_url = rabbit://u:secret@x/\n"
        for each in self.run_check(self.OWN, text)[1].values():
            self.assertNotIn("secret", each["details"])

    def test_nova_has_to_find_the_driver(self) -> None:
        self.have_nova(f"{NEWEST_NOVA}.0.0")
        package = self.directory / "site/nova/virt"
        package.mkdir(parents=True)
        for directory in (package, package.parent):
            (directory / "__init__.py").touch()
        told = self.run_check(self.OWN, self.OURS)[1]["Driver of Nova"]
        self.assertEqual((2, True), (told["result"], "nova.virt.dmigrate" in told["details"]), told)
        (package / "dmigrate").mkdir()
        (package / "dmigrate/__init__.py").touch()
        told = self.run_check(self.OWN, self.OURS)[1]["Driver of Nova"]
        self.assertEqual(0, told["result"], told)

    def run_check(self, own: str, nova: str) -> tuple[int, dict[str, dict[str, object]]]:
        """Exit status, and what the program tells by the names of checks."""
        own = own.replace("broker", "127.0.0.1:1")
        files = [self.write("own.conf", own), self.write("its-nova.conf", nova)]
        path = os.pathsep.join([str(self.directory / "site"), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-m", "nova_dmigrate.cmd.status", "--connect", NOWHERE]
            + [f"--nova-config-file={files[1]}", "upgrade", "check", "--json"]
            + [f"--config-file={files[0]}"],
            env={**os.environ, "PYTHONPATH": path},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual("", done.stderr)
        checks = json.loads(done.stdout)["checks"]
        return done.returncode, {each["check"]: each for each in checks}


class ProgramTest(StatusTestCase):
    def run_program(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "nova_dmigrate.cmd.status", "--connect", NOWHERE, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_all_checks_go_on_when_the_configuration_cannot_be_read(self) -> None:
        missing = str(self.directory / "missing.conf")
        done = self.run_program("upgrade", "check", "--json", "--config-file", missing)
        self.assertEqual((2, ""), (done.returncode, done.stderr))
        told = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
        self.assertEqual(2, told["Configuration"]["result"])
        for name in ("Certificates", "History of migrations", "Host service"):
            self.assertEqual(1, told[name]["result"])
            self.assertIn(missing, told[name]["details"])
        self.assertIn(NOWHERE, told["libvirt and QEMU"]["details"])

    def test_the_table_is_for_people(self) -> None:
        own = self.write("own.conf", f"[DEFAULT]\ntransport_url = {NO_BROKER}\n")
        done = self.run_program("--config-file", str(own), "upgrade", "check")
        self.assertIn("Check: Host service", done.stdout)
        self.assertIn("Result: Failure", done.stdout)

    def test_wrong_usage_has_a_status_of_its_own(self) -> None:
        for arguments in ((), ("upgrade",), ("--no-such-option",)):
            done = self.run_program(*arguments)
            self.assertEqual(2, done.returncode)
            self.assertIn("usage:", done.stderr)

# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-status at host services that answer, do not, or are of another version; and at a
real libvirt.
"""

import dataclasses
import signal
import warnings
from collections.abc import Callable

from oslo_upgradecheck.upgradecheck import Code, Result

from nova_dmigrate import exception
from nova_dmigrate.migration.preflight import version_text
from nova_dmigrate.relay.wire.hello import VERSIONS
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_messages import HOST, HelloArguments, HostState
from nova_dmigrate.rpc.protocol import Protocol
from tests import base
from tests.integration.host_base import Hosts
from tests.lab import workspace
from tests.lab.host_services import HostService
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import PATIENCE, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.cmd.checks import hypervisor, services
    from nova_dmigrate.cmd.checks.base import CheckedHost
    from nova_dmigrate.rpc.broker import BrokerServer, make_conf

_MAJOR = int(HOST.version.partition(".")[0])
LATER = dataclasses.replace(HOST, version=f"{_MAJOR + 1}.0")
OTHER_WIRE = (max(VERSIONS) + 1,)


class Another:
    """A service of which another version tells."""

    def __init__(self, state: HostState) -> None:
        self._state = state

    def hello(self, arguments: HelloArguments) -> HostState:
        return self._state


class ServicesTest(Hosts):
    #: Seconds that services get to answer: on a busy machine they may take longer than usual.
    PATIENCE = 30

    @classmethod
    def options(cls) -> dict[str, object]:
        return {"migration__host_timeout": cls.PATIENCE}

    def host(self, service: HostService, *peers: str) -> CheckedHost:
        return CheckedHost([f"--config-file={service.configuration}"], peers=peers)

    def state(self) -> HostState:
        """What host one says of itself."""
        return self.client_of(self.one).hello(PATIENCE)

    def be(self, name: str, protocol: Protocol = HOST, **said: object) -> None:
        """A service of that name, which says what host one says but for ``said``."""
        state = dataclasses.replace(self.state(), host=name, **said)  # type: ignore[arg-type]
        dispatcher = Dispatcher(Another(state), protocol)
        server = BrokerServer(name, dispatcher, make_conf(), self.broker.services_url())
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(PATIENCE))

    def pose_as(self, name: str) -> CheckedHost:
        """The host of that name, with the configuration of host one."""
        text = self.one.configuration.read_text().replace("name = one", f"name = {name}")
        path = self.place / f"{name}.conf"
        path.write_text(text)
        return CheckedHost([f"--config-file={path}"])

    def assert_told(
        self, code: Code, words: str, check: Callable[[CheckedHost], Result], host: CheckedHost
    ) -> None:
        result = check(host)
        self.assertEqual((code, True), (result.code, words in str(result.details)), result.details)

    def test_a_service_that_answers_tells_its_versions(self) -> None:
        words = f"host one answers: requests {HOST.version}, wire {VERSIONS[0]}, reads volumes"
        self.assert_told(Code.SUCCESS, words, services.own, self.host(self.one))
        self.assert_told(Code.SUCCESS, " by block", services.own, self.host(self.one))

    def test_a_host_without_its_service_is_told(self) -> None:
        words = "Host three: no host service is connected"
        self.assert_told(Code.FAILURE, words, services.own, self.pose_as("three"))
        self.assert_told(Code.WARNING, words, services.others, self.host(self.one, "three"))

    def test_a_service_that_says_nothing_is_told(self) -> None:
        assert self.two.process is not None
        self.restart(self.one, migration__host_timeout=10)
        self.addCleanup(self.restart, self.one)
        self.two.process.send_signal(signal.SIGSTOP)
        self.addCleanup(self.two.process.send_signal, signal.SIGCONT)
        words = "Host two: no answer in time"
        self.assert_told(Code.WARNING, words, services.others, self.host(self.one, "two"))

    def test_a_broker_that_is_killed_is_told(self) -> None:
        self.broker.kill()
        try:
            words = "Host one: no broker can be reached"
            self.assert_told(Code.FAILURE, words, services.own, self.host(self.one))
        finally:
            self.broker.start()
        with self.one.client() as client:
            wait_until(lambda: self.one._answers(client), "the service answers again")

    def test_a_service_that_is_being_stopped_is_told(self) -> None:
        self.addCleanup(self.two.start)
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        self.two.terminate()
        host = self.client_of(self.two)
        wait_until(lambda: host.hello(PATIENCE).draining, "the service is being stopped")
        self.assert_told(Code.WARNING, "host two", services.own, self.host(self.two))
        self.two.terminate()
        self.assertEqual(0, self.two.wait())

    def test_a_service_of_another_version_has_to_be_started_anew(self) -> None:
        self.be("later", LATER)
        self.assertRaises(exception.HostRefused, self.host(self.one).ask, "later")
        self.assert_told(Code.WARNING, "started anew", services.own, self.pose_as("later"))
        for name, said in (
            ("minor", {"version": f"{_MAJOR}.99"}),
            ("wire", {"wire_versions": OTHER_WIRE}),
        ):
            self.be(name, **said)
            self.assert_told(Code.WARNING, "started anew", services.own, self.pose_as(name))

    def test_hosts_that_can_work_together(self) -> None:
        self.be("like-one")
        self.be("minor", version=f"{_MAJOR}.99")
        self.be("both-wires", wire_versions=(*VERSIONS, *OTHER_WIRE))
        host = self.host(self.one, "like-one", "minor", "both-wires")
        self.assert_told(Code.SUCCESS, "host like-one", services.others, host)
        self.assert_told(Code.SUCCESS, f", {OTHER_WIRE[0]}", services.others, host)

    def test_hosts_between_which_migrations_are_ordinary_are_told(self) -> None:
        # Each has directories of its own here
        host = self.host(self.one, "two")
        self.assert_told(Code.WARNING, "Host two: the hosts have other", services.others, host)
        self.be("wire", wire_versions=OTHER_WIRE)
        self.be("tls", tls=True)
        self.be("minor", version=f"{_MAJOR}.99", needs=f"{_MAJOR}.99")
        self.be("later", LATER)
        self.be("confined", obstacle="AppArmor")
        for name, words in (
            ("wire", f"(one has {VERSIONS[0]}, wire has {OTHER_WIRE[0]})"),
            ("tls", "Host tls: one host demands TLS"),
            ("minor", f"version {_MAJOR}.99"),
            ("later", "Host later: "),
            ("confined", "AppArmor"),
            ("three", "Host three: "),
        ):
            host = self.host(self.one, name)
            self.assert_told(Code.WARNING, words, services.others, host)
        result = services.others(self.host(self.one, "wire", "three"))
        for name in ("wire", "three"):
            self.assertIn(f"Host {name}", str(result.details))


class HypervisorTest(base.TestCase):
    def test_a_libvirt_with_qemu_tells_both_versions(self) -> None:
        with workspace() as directory, LibvirtHosts(directory) as hosts:
            connection = hosts.a.connect()
            try:
                versions = connection.getLibVersion(), connection.getVersion()
            finally:
                connection.close()
            result = hypervisor.versions(CheckedHost(connect=hosts.a.uri))
        self.assertEqual(Code.SUCCESS, result.code, result.details)
        numbers = [version_text(each) for each in versions]
        self.assertEqual("libvirt {}, QEMU {}".format(*numbers), result.details)

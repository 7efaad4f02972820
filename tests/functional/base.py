# SPDX-License-Identifier: Apache-2.0
"""Two computes with our driver, one server with a volume, and what there is around."""

import os
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import fixtures
from lxml import etree
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.functional import integrated_helpers
from nova.tests.functional.libvirt import base as libvirt_base

from nova_dmigrate.migration.history import History
from nova_dmigrate.rpc.channel import PORT_NAME
from nova_dmigrate.rpc.host_messages import HOST
from nova_dmigrate.rpc.messages import AGENT
from nova_dmigrate.virt.driver import DMigrateDriver
from tests.base import guard
from tests.functional import services

_ISCSI = {"driver_volume_type": "iscsi", "data": {"target_lun": "1"}}
_CONFIGURATION = """
[migration]
agent_url = fake:
agent_timeout = {patience}
host_timeout = {patience}
queue_time = 2
min_mapped_share = 0
history_directory = {directory}/history
[host]
state_directory = {directory}/state
[relay]
stall_timeout = {stall}
"""


#: A domain's port for the agent.
PORT = f"""
<channel type='unix'><source mode='bind' path='/run/channel'/>
  <target type='virtio' name='{PORT_NAME}'/></channel>
"""


class Killed(BaseException):
    """Ends a thread whose process is killed."""


class MigrationTest(
    libvirt_base.LibvirtMigrationMixin,
    libvirt_base.ServersTestBase,
    integrated_helpers.InstanceHelperMixin,
):
    """Servers on host ``src``, which migrate to ``dest``.

    :ivar hosts: the stand-ins by name. :ivar calls: what libvirt was asked for, one each.
    :ivar devices: in XML, that the domain has besides those that Nova gives it.
    :ivar monitor: QEMU's answer.
    :ivar during: called while libvirt migrates; what it raises libvirt does.
    :ivar failed_during: what it has raised that is not libvirt's, and which Nova takes for that.
    :ivar volumes: of the server that was made last.
    :ivar downtimes: milliseconds that QEMU's limit was set to.
    """

    microversion = "2.84"
    ADMIN_API = True
    #: Extra specs of the servers' flavor.
    EXTRA_SPECS: dict[str, str] = {"dmigrate:policy": "preferred"}
    #: Hosts that have a service.
    SERVICES = ("src", "dest")
    AGENT = True
    #: Seconds for answers. Short where one is waited for in vain.
    PATIENCE = 20
    #: Seconds of silence of relays.
    STALL_TIMEOUT = 30

    def setUp(self) -> None:
        # Nova's cleanups wait for all of its threads, without a limit
        guard(self, float(os.environ.get("OS_TEST_TIMEOUT") or 0))
        self.directory = Path(self.useFixture(fixtures.TempDir()).path)
        self.file = self.directory / "nova-dmigrate.conf"
        self.file.write_text(
            _CONFIGURATION.format(
                directory=self.directory, patience=self.PATIENCE, stall=self.STALL_TIMEOUT
            )
        )
        super().setUp()
        self._keep_messages()
        self.flags(config_file=[str(self.file)], group="dmigrate")
        # Nova's half an hour is longer than any test: what is never answered has to be told
        self.flags(long_rpc_timeout=60)
        # Nova's stand-in of os-brick has it at /dev/sda on each host
        self.cinder.VOLUME_CONNECTION_INFO = {"fake": _ISCSI}
        self.calls: list[dict[str, Any]] = []
        self.downtimes: list[int] = []
        self.aborted, self.paused = threading.Event(), threading.Event()
        self.devices: list[str] = []
        self.during: Any = lambda: None
        self.failed_during: list[BaseException] = []
        self._fake_hypervisor()
        self.hosts = {
            name: services.Host(name, str(self.directory / "sockets")) for name in ("src", "dest")
        }
        for name in self.SERVICES:
            self.useFixture(services.Served(name, self.hosts[name], HOST))
        self.start_compute(hostname="src")
        self.start_compute(hostname="dest")
        self.src, self.dest = self.computes["src"], self.computes["dest"]

    def _keep_messages(self) -> None:
        """Have whoever closes a connection to the broker lose nothing but that connection.

        With oslo.messaging's stand-in of a broker all messages that have not been fetched yet would
        be lost, Nova's too, which then waits for answers.
        """
        self.useFixture(
            fixtures.MonkeyPatch(
                "oslo_messaging._drivers.impl_fake.FakeDriver.cleanup", lambda driver: None
            )
        )

    def _setup_compute_service(self) -> None:
        self.flags(compute_driver=f"dmigrate.{DMigrateDriver.__name__}")

    def _fake_hypervisor(self) -> None:
        """What of libvirt and QEMU Nova's fake lacks."""
        test = self

        def make(domain: Any, *args: Any, **kwargs: Any) -> None:
            original_init(domain, *args, **kwargs)
            # Up to Nova 32 there seems to be a job all the time
            domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_NONE

        def describe(domain: Any, flags: int) -> str:
            return test._described(domain, original_xml(domain, flags))

        def parse(element: Any) -> dict[str, Any]:
            # Up to Nova 33 it misses a source that is neither a file nor a device
            given = {"source": None, "given": etree.tostring(element)}
            return {**given, **original_parse(element)}

        def abort(domain: Any) -> None:
            test.aborted.set()

        def post_copy(domain: Any) -> None:
            test.paused.set()

        def is_active(domain: Any) -> int:
            # One that is paused is; the fake has it otherwise
            return int(domain._state != fakelibvirt.VIR_DOMAIN_SHUTOFF)

        def limit(domain: Any, milliseconds: int, flags: int = 0) -> None:
            test.downtimes.append(milliseconds)

        original_init = fakelibvirt.Domain.__init__
        original_xml = fakelibvirt.Domain.XMLDesc
        original_parse = fakelibvirt._parse_disk_info
        domain = "nova.tests.fixtures.libvirt.Domain."
        for name, function in (
            ("nova.tests.fixtures.libvirt._parse_disk_info", parse),
            (domain + "__init__", make),
            (domain + "XMLDesc", describe),
            (domain + "abortJob", abort),
            (domain + "isActive", is_active),
            (domain + "migrateStartPostCopy", post_copy),
            (domain + "migrateSetMaxDowntime", limit),
        ):
            self.useFixture(fixtures.MonkeyPatch(name, function))
        self._fake_monitor()

    def _fake_monitor(self) -> None:
        """There is no QEMU whose monitor could be asked."""
        self.monitor = lambda: "mtree"
        binding = types.SimpleNamespace(
            qemuMonitorCommand=lambda *arguments: self.monitor(),
            VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP=1,
        )
        name = "libvirt_qemu"
        before = sys.modules.get(name)

        # Only this one: a patch of all would have what the driver imports late imported once more
        def put_back() -> None:
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before

        sys.modules[name] = cast(types.ModuleType, binding)
        self.addCleanup(put_back)

    def _described(self, domain: Any, text: str) -> str:
        """The domain's XML with disks as they were given, of which the fake forgets much."""
        tree = etree.fromstring(text)
        given = {disk["target_dev"]: disk["given"] for disk in domain._def["devices"]["disks"]}
        for element in tree.findall("devices/disk"):
            disk = etree.fromstring(given[element.find("target").get("dev")])
            element.getparent().replace(element, disk)
        tree.find("devices").extend(map(etree.fromstring, self.devices))
        return etree.tostring(tree, encoding="unicode")

    def _migrate_stub(self, domain: Any, destination: str, params: Any, flags: int) -> None:
        self.calls.append({"destination": destination, "flags": flags, **params})
        domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED
        try:
            self.during()
        except Killed:
            # libvirt goes on without whoever has asked it
            raise
        except BaseException as error:
            domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_NONE
            if not isinstance(error, fakelibvirt.libvirtError):
                self.failed_during.append(error)
            raise
        connection = self.dest.driver._host.get_connection()
        connection.createXML(params["destination_xml"], "flags")
        domain.complete_job()

    # What tests do

    def configure(self, group: str, **options: object) -> None:
        """Change our configuration, which nova-compute reads when it first needs it."""
        with self.file.open("a") as file:
            file.write(f"[{group}]\n")
            file.writelines(f"{name} = {value}\n" for name, value in options.items())

    def make_server(
        self, volumes: int = 1, connections: Sequence[Any] = (), **more: Any
    ) -> dict[str, Any]:
        """A server on ``src`` with volumes, and its agent.

        :param connections: how its first volumes are connected, as Cinder tells it.
        """
        flavor = self._create_flavor(extra_spec=self.EXTRA_SPECS or None)
        server = self._create_server(flavor_id=flavor, host="src", networks="none", **more)
        self.volumes = [str(uuid.uuid4()) for _ in range(max(volumes, len(connections)))]
        self.cinder.VOLUME_CONNECTION_INFO.update(zip(self.volumes, connections, strict=False))
        for volume in self.volumes:
            attachment = {"volumeAttachment": {"volumeId": volume}}
            self.api.post_server_volume(server["id"], attachment)
            self._wait_for_volume_attach(server["id"], volume)
        if self.AGENT:
            self.agent = services.Agent(self.volumes[0][:20])
            self.useFixture(services.Served(server["id"], self.agent, AGENT))
        self.server = server
        return server

    def move(self, server: dict[str, Any], to: str = "dest") -> None:
        """Migrate it; returns when it is there and Nova has done all."""
        self.migrate(server, to=to)
        there = {"OS-EXT-SRV-ATTR:host": to, "OS-EXT-STS:task_state": None, "status": "ACTIVE"}

        def arrived() -> bool:
            now = self.admin_api.get_server(server["id"])
            return all(now[name] == value for name, value in there.items())

        self.wait_for(arrived, pause=0.5)
        self._wait_for_migration_status(server, ["completed"])

    def migrate(self, server: dict[str, Any], refused: bool = False, to: str = "dest") -> None:
        """Ask for it; it goes on by itself.

        :param refused: it will be, which Nova's tests, where casts are calls, see as an answer.
        """
        body = {"os-migrateLive": {"host": to, "block_migration": "auto"}}
        expected = {"check_response_status": [500]} if refused else {}
        self.api.post_server_action(server["id"], body, **expected)

    def _wait_for_migration_status(self, server: Any, expected_statuses: Any) -> Any:
        """As Nova's, which gives up after five seconds."""
        for _ in range(12):
            try:
                return super()._wait_for_migration_status(server, expected_statuses)
            except self.failureException as error:
                last = error
        raise last

    def wait_for(
        self, condition: Callable[[], Any], seconds: float = 60, pause: float = 0.05
    ) -> None:
        """Until that is so. What has gone wrong while libvirt migrated is raised here as well."""
        end = time.monotonic() + seconds
        while not condition():
            if self.failed_during:
                raise self.failed_during[0]
            if time.monotonic() > end:
                self.fail(f"it is not so after {seconds:g} s")
            time.sleep(pause)

    def settled(self, server: dict[str, Any]) -> str:
        """The status of the server's migration that has not completed, when all is put back."""
        self.wait_for(lambda: not self.src.driver._relaying)
        statuses = ["failed", "cancelled", "error"]
        self._wait_for_migration_status(server, statuses)
        # Nova, which has put all back, may take it for an error on top
        self.wait_for(lambda: not self.src.driver.active_migrations)
        self._wait_for_server_parameter(server, {"OS-EXT-STS:task_state": None})
        self.wait_for(lambda: not self._at_work())
        status: str = self._wait_for_migration_status(server, statuses)["status"]
        return status

    def _at_work(self) -> bool:
        """Whether a live migration is still somewhere between its threads."""
        tasks = getattr(self.src.manager, "_in_progress_tasks", {}).values()
        return any("live_migration" in str(task) for task in tasks)

    def domain(self, server: dict[str, Any]) -> Any:
        """It at the source, as the fake of libvirt has it."""
        return self.src.driver._host.get_connection().lookupByUUIDString(server["id"])

    def assert_closed(self) -> None:
        """Nothing is left of relays."""
        for host in self.hosts.values():
            self.assertEqual([order.session_id for order in host.orders], host.closed)

    def host_of(self, server: dict[str, Any]) -> str:
        host: str = self.api.get_server(server["id"])["OS-EXT-SRV-ATTR:host"]
        return host

    def event(self, server: dict[str, Any], name: str = "compute_dmigrate") -> dict[str, Any]:
        """The event of that name in the server's last live migration; waited for."""
        for _ in range(50):
            for action in self.api.get_instance_actions(server["id"]):
                path = f"/servers/{server['id']}/os-instance-actions/{action['request_id']}"
                events = self.api.api_get(path).body["instanceAction"]["events"]
                for event in events:
                    if event["event"] == name and event["result"]:
                        found: dict[str, Any] = event
                        return found
            time.sleep(0.1)
        raise AssertionError(f"no event {name}")

    def summaries(self) -> Any:
        """The history, newest first."""
        return History(self.directory / "history").list()

    def libvirt_fails(self, message: str = "operation failed: the job has ended") -> None:
        """What libvirt says of a migration that has failed."""
        raise fakelibvirt.make_libvirtError(
            fakelibvirt.libvirtError, message, error_code=fakelibvirt.VIR_ERR_INTERNAL_ERROR
        )

    @property
    def orders(self) -> list[Any]:
        """All orders of relays."""
        return [order for host in self.hosts.values() for order in host.orders]

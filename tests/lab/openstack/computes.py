# SPDX-License-Identifier: Apache-2.0
"""What runs on a compute host: nova-compute with DMigrate's driver, DMigrate's host service, and
the way from there to the control plane.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.rpc.broker import BrokerTransport
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.openstack import nova, taps
from tests.lab.openstack.client import CloudError
from tests.lab.openstack.configuration import Options, write
from tests.lab.openstack.site import Site
from tests.lab.openstack.storage import Storage
from tests.lab.openstack.venv import program

_RUN = Path("/run/nova-dmigrate")
#: Where libvirt has the process numbers of its guests.
_PIDS = Path("/run/libvirt/qemu")
#: Of emulated guests on a busy machine.
_PATIENCE = {"agent_timeout": 60, "host_timeout": 30, "map_time": 600}


class Compute:
    """One compute host.

    ``name``: as Nova and the host services know it.
    """

    def __init__(self, site: Site, storages: Sequence[Storage], host: LibvirtHost) -> None:
        self.name = host.name
        self.host = host
        self._site = site
        self._storages = storages
        self._directory = site.directory / host.name

    def start(self) -> None:
        """Start all of it; `Client.wait_for_computes` waits until Nova knows it.

        :raises ServiceError: it does not start.
        """
        services, host = self._site.services, self.host
        for port in (*self._site.ports.values(), self._site.broker.port):
            host.forward(port)
        taps.start(services, host)
        self._share_instances()
        for storage in self._storages:
            storage.prepare_host(host)
        for each in (_RUN, self._history):
            host.run(["mkdir", "-p", str(each)])
        dmigrate = self._configure_dmigrate()
        self._more.touch()
        self._site.configure(
            self._nova_conf,
            nova.asks_others(self._site),
            self._nova_options(dmigrate),
            *(each.nova_options() for each in self._storages),
        )
        self.ensure_running()

    def ensure_running(self) -> None:
        """Start what of it does not run: libvirtd, DMigrate's host service, nova-compute. The
        latter two may not be reached yet.

        :raises LibvirtHostError: libvirtd does not start.
        """
        services, host = self._site.services, self.host
        if not host.runs_libvirtd:
            host.start_libvirtd()
        for name, command, files in (
            (self.host_service, "nova-dmigrate-host", (self._dmigrate, self._more)),
            (self.nova_compute, "nova-compute", (self._site.directory / self._nova_conf,)),
        ):
            if not services.runs(name):
                options = (f"--config-file={file}" for file in files)
                services.start(name, [program(command), *options], host)

    @contextlib.contextmanager
    def other_options(self, options: Options) -> Iterator[None]:
        """Its host service, which may not be reached yet, has other options meanwhile."""
        write(self._more, options)
        self._site.services.stop(self.host_service)
        try:
            self.ensure_running()
            yield
        finally:
            self._more.write_text("")
            self._site.services.stop(self.host_service)
            self.ensure_running()

    def die(self) -> None:
        """Kill all that serves here, and all guests. The network of the guests stays, and what is
        mounted.

        :raises CloudError: no guest has run here.
        """
        for name in (self.nova_compute, self.host_service):
            if self._site.services.runs(name):
                self._site.services.kill(name)
        self.host.kill_libvirtd()
        killed = 0
        for file in self.host.outside(_PIDS).glob("instance-*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
                killed += 1
        if not killed:
            raise CloudError(f"no guest ran on {self.name}")

    def serves(self) -> bool:
        """Whether DMigrate's host service answers."""
        transport = BrokerTransport(self.name, self._site.broker.services_url(), HOST)
        with HostClient(self.name, transport) as client:
            try:
                return client.hello().host == self.name
            except exception.HostUnreachable:
                return False

    def guests(self) -> list[str]:
        """UUIDs of the guests that libvirt knows here.

        :raises libvirt.libvirtError: it does not answer.
        """
        connection = self.host.connect()
        try:
            return [each.UUIDString() for each in connection.listAllDomains()]
        finally:
            connection.close()

    def said(self, words: str) -> int:
        """How often nova-compute has said something in its log."""
        log = self._site.services.log(self.nova_compute)
        return log.read_text(errors="replace").count(words)

    @property
    def nova_compute(self) -> str:
        """The service's name, and that of its log."""
        return f"nova-compute-{self.name}"

    @property
    def host_service(self) -> str:
        """The service's name, and that of its log."""
        return f"nova-dmigrate-host-{self.name}"

    @property
    def _dmigrate(self) -> Path:
        """The configuration of DMigrate."""
        return self._directory / "nova-dmigrate.conf"

    @property
    def _more(self) -> Path:
        """More of that, which its host service alone has."""
        return self._directory / "more.conf"

    @property
    def _nova_conf(self) -> str:
        """Its name in the site's directory."""
        return f"{self.name}/nova.conf"

    @property
    def _history(self) -> Path:
        return self._directory / "history"

    def _share_instances(self) -> None:
        """All hosts see the same directory of instances, each as a client of its server."""
        export = self._site.directory / "instances-export"
        for each in (export, self._instances):
            each.mkdir(exist_ok=True)
        mount = ["bindfs", "-f", "-o", "subtype=glusterfs,nonempty"]
        name = f"instances-{self.name}"
        self._site.services.start(name, [*mount, str(export), str(self._instances)], self.host)

        def mounted() -> bool:
            argv = ["mountpoint", "--quiet", str(self._instances)]
            return subprocess.run(self.host.argv(argv), check=False).returncode == 0

        self._site.services.wait(name, mounted, "mount the instances")

    @property
    def _instances(self) -> Path:
        return self._site.directory / "instances"

    def _nova_options(self, dmigrate: Path) -> Options:
        state = self._directory / "state"
        state.mkdir(parents=True, exist_ok=True)
        return {
            "DEFAULT": {
                "host": self.name,
                "my_ip": self.host.address,
                "state_path": state,
                "instances_path": self._instances,
                "compute_driver": "dmigrate.DMigrateDriver",
                # Neutron's answer is that a port is active, which it says as it binds it
                "vif_plugging_is_fatal": False,
                "vif_plugging_timeout": 0,
                "force_raw_images": False,
                "reserved_host_memory_mb": 0,
                "reserved_host_disk_mb": 0,
                "graceful_shutdown_timeout": 5,
                # All servers of a host are migrated at once
                "max_concurrent_live_migrations": 4,
                "cpu_allocation_ratio": 16,
                "ram_allocation_ratio": 4,
                "disk_allocation_ratio": 16,
            },
            "compute": {"live_migration_wait_for_vif_plug": False},
            "libvirt": {
                "virt_type": "qemu",
                "cpu_mode": "custom",
                "cpu_models": "Nehalem",
                "live_migration_uri": "qemu+tcp://%s/system",
                "live_migration_inbound_addr": self.host.address,
                "swtpm_enabled": False,
            },
            "workarounds": {"skip_cpu_compare_on_dest": True, "skip_cpu_compare_at_startup": True},
            "dmigrate": {"config_file": dmigrate, "policy_from_metadata": True},
        }

    def _configure_dmigrate(self) -> Path:
        broker = self._site.broker
        # Agents' virtual hosts are named by their instances
        agents, _, _ = broker.services_url().rpartition("/")
        certificate, key = self._site.authority.issue(self.name)
        return write(
            self._dmigrate,
            {
                "DEFAULT": {"transport_url": broker.services_url()},
                "host": {
                    "name": self.name,
                    "socket_directory": _RUN,
                    "state_directory": self._directory / "dmigrate",
                    "drain_timeout": 1,
                },
                "wire": {
                    "ca_file": self._site.authority.certificate,
                    "certificate_file": certificate,
                    "key_file": key,
                    "listen_address": self.host.address,
                },
                "migration": {
                    "agent_transport": "broker",
                    "agent_url": f"{agents}/",
                    "history_directory": self._history,
                    **_PATIENCE,
                },
            },
            *(each.dmigrate_options() for each in self._storages),
        )

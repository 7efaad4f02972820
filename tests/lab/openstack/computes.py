# SPDX-License-Identifier: Apache-2.0
"""What runs on a compute host: nova-compute with DMigrate's driver, DMigrate's host service, and
the way from there to the control plane.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.libvirt_host import LibvirtHost
from tests.lab.openstack import nova, taps
from tests.lab.openstack.configuration import Options, write
from tests.lab.openstack.site import Site
from tests.lab.openstack.storage import Storage
from tests.lab.openstack.venv import program

_RUN = Path("/run/nova-dmigrate")
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
        self.start_host_service()
        file = self._site.configure(
            f"{self.name}/nova.conf",
            nova.asks_others(self._site),
            self._nova_options(dmigrate),
            *(each.nova_options() for each in self._storages),
        )
        services.start(
            self.nova_compute, [program("nova-compute"), "--config-file", str(file)], host
        )

    def start_host_service(self) -> None:
        """Start DMigrate's host service; it may not be reached yet."""
        argv = [program("nova-dmigrate-host"), "--config-file", str(self._dmigrate)]
        self._site.services.start(self.host_service, argv, self.host)

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
        return write(
            self._dmigrate,
            {
                "DEFAULT": {"transport_url": broker.services_url()},
                "host": {
                    "name": self.name,
                    "socket_directory": _RUN,
                    "state_directory": self._directory / "dmigrate",
                    "volume_directories": "/",
                    "drain_timeout": 1,
                },
                "wire": {"tls": False, "listen_address": self.host.address},
                "migration": {
                    "agent_transport": "broker",
                    "agent_url": f"{agents}/",
                    "history_directory": self._history,
                    **_PATIENCE,
                },
            },
            *(each.dmigrate_options() for each in self._storages),
        )

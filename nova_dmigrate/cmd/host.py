# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-host: the service of a compute host, which runs the relays of migrations.

SIGTERM: no new migrations, and the running ones get ``[host]drain_timeout`` seconds; then, or at
a second signal, the service ends. Relays that still run go on, and the next service takes them
over.

Exit status: 0 stopped, 2 wrong configuration.
"""

import functools
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from oslo_config import cfg
from oslo_log import log

from nova_dmigrate import conf, exception, version
from nova_dmigrate.cmd import extras
from nova_dmigrate.cmd.signals import Signals
from nova_dmigrate.host import downtime, qemu_account
from nova_dmigrate.host.capacity import Limits, Load, Rates, shortage
from nova_dmigrate.host.hypervisor import UNKNOWN, HypervisorVersions, Versions
from nova_dmigrate.host.presence import Presence
from nova_dmigrate.host.service import HostService, ServiceSettings
from nova_dmigrate.host.session import SessionSettings
from nova_dmigrate.host.sessions import Sessions
from nova_dmigrate.host.store import Store
from nova_dmigrate.host.vouching import Disks
from nova_dmigrate.retention import Retention
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST

LOG = log.getLogger(__name__)

PROGRAM = "nova-dmigrate-host"
_WELL, _WRONG_CONFIGURATION = 0, 2
_MIB = 1 << 20
#: A relay's program and what it has of the stream.
_PROGRAM_MIB = 128
#: Bytes for each mapped page: 22 at the source while the map is placed, 35 at the destination at
#: its end; measured, see the test of that and the contributor guide's chapter on scale.
_PAGE_MEMORY = 40
#: Requests at the same time: some wait for a relay or an agent.
_THREADS = 16
_ANY_ADDRESS = ("0.0.0.0", "::")


def limits_from(config: cfg.ConfigOpts) -> Limits:
    """What relays may take together, in bytes and bytes a second.

    :raises ConfigurationError: there is no room for a single migration.
    """
    host, relay = config.host, config.relay
    limits = Limits(
        max_relays=host.max_relays,
        memory=host.memory_limit * _MIB,
        relay_memory={
            "source": (relay.window_size + _PROGRAM_MIB) * _MIB,
            "destination": (2 * relay.read_ahead + _PROGRAM_MIB) * _MIB,
        },
        page_memory=_PAGE_MEMORY,
        max_pages=config.buffer_map.max_pages,
        host=Rates(host.network_bandwidth * _MIB, host.volume_bandwidth * _MIB),
        relay=Rates(relay.network_bandwidth * _MIB, config.volume.bandwidth * _MIB),
    )
    for role in ("source", "destination"):
        lack = shortage(limits, (), Load(role))
        if lack is not None:
            raise exception.ConfigurationError(
                reason=f"[host]memory_limit leaves no room for a migration: {lack}"
            )
    return limits


def session_settings_from(config: cfg.ConfigOpts, name: str) -> SessionSettings:
    """:raises ConfigurationError: QEMU's user or group does not exist, or limits exclude all."""
    host = config.host
    return SessionSettings(
        command=relay_command(config),
        limits=limits_from(config),
        address=name,
        queue_timeout=host.queue_timeout,
        max_lease=host.max_lease,
        summaries=Retention(count=host.summary_count, days=host.summary_days),
        owner=qemu_account.owner(host.qemu_user, host.qemu_group),
    )


def service_settings_from(
    config: cfg.ConfigOpts, name: str, owner: tuple[int, int]
) -> ServiceSettings:
    """What the service says of its host, and allows on it."""
    host, address = config.host, str(config.wire.listen_address)
    return ServiceSettings(
        name=name,
        migration_address=None if address in _ANY_ADDRESS else address,
        tls=config.wire.tls,
        max_relays=host.max_relays,
        qemu_user=os.geteuid() if owner == qemu_account.OWN else owner[0],
        volume_directories=tuple(host.volume_directories),
        rbd_images=tuple(host.rbd_images),
        iscsi_units=tuple(host.iscsi_units),
        volume_keys=bool(host.volume_keys and host.libvirt_uri),
        map_directories=tuple(host.map_directories) or (f"{host.state_directory}/maps",),
        channel_directories=tuple(host.channel_directories),
    )


def relay_command(config: cfg.ConfigOpts) -> list[str]:
    """What starts a relay with the same interpreter and configuration as this service."""
    command = [sys.executable, "-m", "nova_dmigrate.cmd.relay"]
    for path in config.config_file or ():
        command += ["--config-file", str(Path(path).absolute())]
    for path in config.config_dir or ():
        command += ["--config-dir", str(Path(path).absolute())]
    return command


def disks_from(config: cfg.ConfigOpts) -> Disks | None:
    """What tells the disks of this host's guests; None if they shall not be looked at.

    :raises ConfigurationError: it needs what is not installed.
    """
    libvirt = _libvirt_of(config)
    return functools.partial(libvirt.disks, config.host.libvirt_uri) if libvirt else None


def downtime_from(config: cfg.ConfigOpts) -> downtime.Ask | None:
    """What tells how long a guest of this host stood still when it came; None if libvirt shall not
    be asked.

    :raises ConfigurationError: it needs what is not installed.
    """
    libvirt = _libvirt_of(config)
    return functools.partial(libvirt.downtime, config.host.libvirt_uri) if libvirt else None


def versions_from(config: cfg.ConfigOpts) -> Callable[[], Versions]:
    """What tells the versions of this host's libvirt and QEMU; nothing if it shall not be asked.

    :raises ConfigurationError: it needs what is not installed.
    """
    libvirt = _libvirt_of(config)
    if libvirt is None:
        return lambda: UNKNOWN
    versions = HypervisorVersions(functools.partial(libvirt.versions, config.host.libvirt_uri))
    versions.known()  # so that they are when somebody asks
    return versions.known


def _libvirt_of(config: cfg.ConfigOpts) -> ModuleType | None:
    """What asks this host's libvirt, the URI before all else; None if that shall not be asked."""
    if not config.host.libvirt_uri:
        return None
    try:
        from nova_dmigrate.migration import host_libvirt
    except ImportError as error:
        raise exception.ConfigurationError(
            reason="[host]libvirt_uri needs the Python binding of libvirt, of the extra 'host':"
            f" {error}"
        ) from error
    return host_libvirt


def main(arguments: list[str] | None = None) -> int:
    """Run the service until it is told to stop; returns the exit status."""
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    log.register_options(config)
    try:
        config(
            sys.argv[1:] if arguments is None else arguments,
            project="nova-dmigrate",
            prog=PROGRAM,
            version=version.version_string(),
        )
        if not (config.log_file or config.log_dir or config.use_journal):
            config.set_override("use_stderr", True)
        log.setup(config, "nova-dmigrate")
        # Relays do without oslo.messaging, and so does whoever reads this module's settings
        with extras.needed(PROGRAM, "host"):
            importlib.import_module("nova_dmigrate.rpc.broker")
        name = config.host.name or socket.gethostname()
        settings = session_settings_from(config, name)
        disks, versions = disks_from(config), versions_from(config)
        downtime_of = downtime_from(config)
        store = Store(Path(config.host.state_directory), Path(config.host.socket_directory))
        presence = Presence(lambda: _own_client(config, name))
        sessions = Sessions(settings, store, presence.seen)
        _offer_metrics(config, sessions)
    except (cfg.Error, exception.ConfigurationError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _WRONG_CONFIGURATION
    service = HostService(
        service_settings_from(config, name, settings.owner),
        sessions,
        store,
        disks,
        versions,
        downtime_of,
    )
    _serve(config, name, service, sessions, presence)
    store.close()
    return _WELL


def _serve(
    config: cfg.ConfigOpts,
    name: str,
    service: HostService,
    sessions: Sessions,
    presence: Presence,
) -> None:
    from nova_dmigrate.rpc import broker, calm

    signals = Signals()
    broker.set_defaults(config, threads=_THREADS)
    # At DEBUG they tell of every byte
    for chatty in ("amqp", "oslo.messaging", "oslo_messaging"):
        logging.getLogger(chatty).setLevel(logging.INFO)
    calm.calm()
    server = broker.BrokerServer(name, Dispatcher(service, HOST), config)
    sessions.start()
    server.start()
    presence.start()
    LOG.info("%s %s for host %s", PROGRAM, version.version_string(), name)
    signals.wait()
    LOG.info("Stopping: %d relays run", sessions.running)
    sessions.drain()
    if not sessions.wait_until_idle(config.host.drain_timeout, signals.pending):
        LOG.warning("%d relays go on without this service", sessions.running)
    presence.stop()
    server.stop()
    sessions.stop()


def _own_client(config: cfg.ConfigOpts, name: str) -> HostClient:
    from nova_dmigrate.rpc import broker

    return HostClient(name, broker.BrokerTransport(name, config.transport_url, HOST, config))


def _offer_metrics(config: cfg.ConfigOpts, sessions: Sessions) -> None:
    """:raises ConfigurationError: they are wanted, and it is not possible."""
    address, port = str(config.host.metrics_address), config.host.metrics_port
    if not port:
        return
    try:
        from nova_dmigrate.host import metrics

        metrics.serve(sessions.figures, address, port)
    except (ImportError, OSError) as error:
        raise exception.ConfigurationError(
            reason=f"[host]metrics_port: no metrics at {address}, port {port}: {error}"
        ) from error
    LOG.info("Metrics for Prometheus are at http://%s:%d/metrics", address, port)


if __name__ == "__main__":
    sys.exit(main())

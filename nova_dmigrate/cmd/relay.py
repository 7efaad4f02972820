# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-relay: one end of one migration, as a process of its own.

The session's description comes on standard input or from a file, because it holds the migration's
token. Standard output tells, one JSON object a line, first ``{"event": "ready", ...}`` (with
``host`` and ``port`` at the destination) and at the end ``{"event": "end", "state": ..., "reason":
...}``. ``{"event": "kept"}`` in between: QEMU may begin post-copy, after which the guest is lost
without this process. From then on SIGTERM does nothing, and nobody may use SIGKILL; nor does the
kernel as soon as before, when memory runs out.

Exit status: 0 delivered, 1 failed, 2 wrong configuration or session, 3 cancelled.
"""

import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_log import log

from nova_dmigrate import conf, exception, version
from nova_dmigrate.cmd.signals import Signals
from nova_dmigrate.relay.destination import DestinationRelay
from nova_dmigrate.relay.oom import Expendability
from nova_dmigrate.relay.session import (
    DestinationSession,
    RelaySettings,
    SessionDefaults,
    SourceSession,
    parse_session,
)
from nova_dmigrate.relay.source import SourceRelay
from nova_dmigrate.volumes import Keys, VolumeAccess

LOG = log.getLogger(__name__)

_EXIT = {"delivered": 0, "failed": 1, "cancelled": 3}
_WRONG_CONFIGURATION = 2
_SESSION_LIMIT = 1 << 20
_KIB = 1 << 10
_MIB = 1 << 20

CLI_OPTIONS = [
    cfg.StrOpt(
        "session", default="-", help="File with the session's description; - for standard input."
    )
]


def settings_from(config: cfg.ConfigOpts) -> RelaySettings:
    """The options of this host in the units that the relays use: bytes, seconds, bytes a second."""
    relay, volume, buffer_map = config.relay, config.volume, config.buffer_map
    return RelaySettings(
        window_size=relay.window_size * _MIB,
        read_ahead=relay.read_ahead * _MIB,
        channels=relay.channels,
        compression=relay.compression,
        batch_size=relay.batch_size * _KIB,
        queue_delay=relay.queue_delay / 1000,
        hurry_threshold=relay.hurry_threshold / 1000,
        hold_pages=relay.hold_pages,
        connect_timeout=relay.connect_timeout,
        handshake_timeout=config.wire.handshake_timeout,
        stall_timeout=relay.stall_timeout,
        idle_timeout=relay.idle_timeout,
        network_bandwidth=relay.network_bandwidth * _MIB,
        volume_queue_depth=volume.queue_depth,
        volume_read_size=volume.read_size * _KIB,
        volume_merge_gap=volume.merge_gap * _KIB,
        volume_bandwidth=volume.bandwidth * _MIB,
        volume_error_limit=volume.error_limit,
        volume_access=VolumeAccess(
            timeout=volume.timeout,
            rbd_user=volume.rbd_user,
            rbd_configuration=volume.rbd_configuration,
            rbd_keyring=volume.rbd_keyring,
            keys=keys_from(config),
        ),
        max_map_pages=buffer_map.max_pages,
        max_map_volumes=buffer_map.max_volumes,
        max_map_chunk_size=buffer_map.max_chunk_size * _KIB,
    )


def keys_from(config: cfg.ConfigOpts) -> Keys | None:
    """What tells the keys of encrypted volumes; None if relays shall have none."""
    uri, patience = config.host.libvirt_uri, config.volume.timeout
    if not (config.host.volume_keys and uri):
        return None

    def key(name: str) -> bytes:
        # All other migrations do without libvirt
        try:
            from nova_dmigrate.migration import volume_keys
        except ImportError as error:
            raise exception.HypervisorError(peer=uri, reason=str(error)) from error
        return volume_keys.key_of(uri, name, patience)

    return key


def defaults_from(config: cfg.ConfigOpts) -> SessionDefaults:
    """What sessions may leave to this host."""
    return SessionDefaults(
        tls=config.wire.tls,
        ca=config.wire.ca_file,
        certificate=config.wire.certificate_file,
        key=config.wire.key_file,
        listen_host=config.wire.listen_address,
        listen_port=config.wire.port,
        summaries=Path(config.relay.summary_directory),
        runtime=Path(config.relay.runtime_directory),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one relay; returns the exit status."""
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    config.register_cli_opts(CLI_OPTIONS)
    log.register_options(config)
    try:
        config(
            sys.argv[1:] if arguments is None else arguments,
            project="nova-dmigrate",
            prog="nova-dmigrate-relay",
            version=version.version_string(),
        )
        if not (config.log_file or config.log_dir or config.use_journal):
            # Standard output, where oslo.log would write otherwise, belongs to the events.
            config.set_override("use_stderr", True)
        log.setup(config, "nova-dmigrate")
        session = parse_session(_read_session(config.session), defaults_from(config))
        settings = _with_place(settings_from(config), session)
        _make_directories(session)
    except (cfg.Error, exception.ConfigurationError, OSError) as error:
        print(f"nova-dmigrate-relay: {error}", file=sys.stderr)
        _tell({"event": "end", "state": "failed", "reason": str(error)})
        return _WRONG_CONFIGURATION
    return _run(session, settings)


def _read_session(name: str) -> str:
    if name == "-":
        return sys.stdin.read(_SESSION_LIMIT)
    with Path(name).open() as file:
        return file.read(_SESSION_LIMIT)


def _with_place(
    settings: RelaySettings, session: SourceSession | DestinationSession
) -> RelaySettings:
    """Readers of volumes make files where the relay has its socket: there it may."""
    if session.control_socket is None:
        return settings
    access = dataclasses.replace(
        settings.volume_access, runtime_directory=session.control_socket.parent
    )
    return dataclasses.replace(settings, volume_access=access)


def _make_directories(session: SourceSession | DestinationSession) -> None:
    for path in (session.control_socket, session.summary):
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _run(session: SourceSession | DestinationSession, settings: RelaySettings) -> int:
    relay: SourceRelay | DestinationRelay
    ready: dict[str, Any] = {"event": "ready"}
    expendability = Expendability()

    def on_kept() -> None:
        _tell({"event": "kept"})
        expendability.spare()

    try:
        if isinstance(session, SourceSession):
            relay = SourceRelay(session, settings, on_kept)
            relay.prepare()
        else:
            relay = DestinationRelay(session, settings, on_kept)
            ready["host"], ready["port"] = relay.prepare()
    except exception.DMigrateError as error:
        LOG.error("Instance %s: the relay cannot start: %s", session.instance, error)
        _tell({"event": "end", "state": "failed", "reason": str(error)})
        return _EXIT["failed"]

    signals = Signals()

    def cancel_when_told() -> None:
        while True:
            signals.wait()
            relay.cancel()

    threading.Thread(target=cancel_when_told, name="cancel", daemon=True).start()
    _tell(ready)
    summary = relay.run()
    _tell({"event": "end", "state": summary["state"], "reason": summary["reason"]})
    return _EXIT[summary["state"]]


def _tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())

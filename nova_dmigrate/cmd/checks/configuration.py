# SPDX-License-Identifier: Apache-2.0
"""Our own configuration, and the files that it names."""

from oslo_upgradecheck.upgradecheck import Result

from nova_dmigrate import exception
from nova_dmigrate.cmd import host as host_service
from nova_dmigrate.cmd import relay
from nova_dmigrate.cmd.checks.base import CheckedHost, failure, warning, well
from nova_dmigrate.migration.history import history_of
from nova_dmigrate.relay.wire.tls import TlsSettings, server_context


def options(host: CheckedHost) -> Result:
    """The files can be read, and host service and relays can begin with what they say."""
    try:
        config = host.config
        host_service.session_settings_from(config, host.name)
        host_service.disks_from(config)
        relay.settings_from(config)
        relay.defaults_from(config)
    except exception.ConfigurationError as error:
        return failure(str(error))
    files = ", ".join([*config.config_file, *config.config_dir])
    if not files:
        return warning(
            "There is no /etc/nova-dmigrate/nova-dmigrate.conf, and no other file was named"
            " (--config-file): all options have their defaults"
        )
    return well(f"{files}: host {host.name} can work with these options")


def certificates(host: CheckedHost) -> Result:
    """Relays can prove who they are."""
    wire = host.config.wire
    if not wire.tls:
        return well("[wire]tls is off: relays do not encrypt, and need no certificate")
    try:
        server_context(
            TlsSettings(wire.ca_file, wire.certificate_file, wire.key_file, peer_name=host.name)
        )
    except exception.ConfigurationError as error:
        return failure(f"[wire]ca_file, certificate_file and key_file: {error}")
    return well(f"[wire]: {wire.certificate_file} and its key can be used")


def history(host: CheckedHost) -> Result:
    """The migrations that have been can be looked at."""
    directory = host.config.migration.history_directory
    past = history_of(host.config)
    broken = []
    try:
        identifiers = past.ids()
    except exception.HistoryError as error:
        return failure(f"[migration]history_directory: {error}")
    for identifier in identifiers:
        try:
            past.get(identifier)
        except exception.HistoryError as error:
            broken.append(str(error))
    if broken:
        return warning(
            f"[migration]history_directory: {len(broken)} of {len(identifiers)} migrations cannot"
            f" be read. {broken[0]}"
        )
    return well(f"[migration]history_directory: {directory} has {len(identifiers)} migrations")

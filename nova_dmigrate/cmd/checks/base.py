# SPDX-License-Identifier: Apache-2.0
"""The host that is checked, and the results that checks have."""

import functools
import socket
from collections.abc import Sequence
from importlib import metadata

from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code, Result

from nova_dmigrate import conf, exception
from nova_dmigrate.cmd import host as host_service
from nova_dmigrate.migration import peers
from nova_dmigrate.rpc import broker
from nova_dmigrate.rpc.host_messages import HostState
from nova_dmigrate.virt import configuration

#: As whom nova-compute looks for its files.
_NOVA_PROJECT, _NOVA_PROGRAM = "nova", "nova-compute"


class CheckedHost:
    """This host, as its configurations say. What they say is read when it is asked for.

    :ivar peers: names of other hosts whose services are asked.
    """

    def __init__(
        self,
        own_files: Sequence[str] = (),
        nova_files: Sequence[str] = (),
        peers: Sequence[str] = (),
        connect: str | None = None,
    ) -> None:
        """:param own_files: arguments that name configuration files, as the host service takes
            them; none for the usual ones.
        :param nova_files: Nova's configuration files; none for the usual ones.
        :param connect: URI of its libvirt; None for what the host service has.
        """
        self._own_files = list(own_files)
        self._nova_files = list(nova_files)
        self.peers = tuple(peers)
        self._connect = connect

    @functools.cached_property
    def config(self) -> cfg.ConfigOpts:
        """What the host service has.

        :raises ConfigurationError: it cannot be read, or says what cannot be.
        """
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        broker.set_defaults(config)
        try:
            config(self._own_files, project="nova-dmigrate", prog=host_service.PROGRAM)
        except (cfg.Error, ValueError) as error:
            raise exception.ConfigurationError(reason=str(error)) from error
        conf.check(config)
        return config

    @property
    def name(self) -> str:
        """Of its service.

        :raises ConfigurationError: as `config`.
        """
        return self.config.host.name or socket.gethostname()

    @property
    def libvirt_uri(self) -> str:
        """Of its libvirt; empty for none.

        :raises ConfigurationError: as `config`, if it has to be looked at.
        """
        return self.config.host.libvirt_uri if self._connect is None else self._connect

    @functools.cached_property
    def nova(self) -> cfg.ConfigOpts | None:
        """What nova-compute has, as far as it concerns us; None if there is no Nova here.

        :raises ConfigurationError: it cannot be read.
        """
        found = self._nova_files or cfg.find_config_files(_NOVA_PROJECT, _NOVA_PROGRAM)
        if not found and self.nova_version is None:
            return None
        config = cfg.ConfigOpts()
        config.register_opts(
            [
                cfg.StrOpt("host", default=socket.gethostname()),
                cfg.StrOpt("compute_driver"),
                cfg.StrOpt("state_path", default="/var/lib/nova"),
            ]
        )
        broker.set_defaults(config)
        configuration.register(config)
        arguments = [f"--config-file={path}" for path in self._nova_files]
        try:
            config(arguments, project=_NOVA_PROJECT, prog=_NOVA_PROGRAM)
        except (cfg.Error, ValueError) as error:
            raise exception.ConfigurationError(reason=str(error)) from error
        return config

    @functools.cached_property
    def nova_version(self) -> str | None:
        """Of the Nova in this Python environment; None if there is none."""
        try:
            return metadata.version("nova")
        except metadata.PackageNotFoundError:
            return None

    def ask(self, name: str) -> HostState:
        """What the service of a host says of itself, asked as for a migration.

        :raises HostError: it says nothing, or no.
        :raises ConfigurationError: as `config`.
        """
        settings = peers.settings_from(self.config)
        with peers.host_client(name, self.config, settings) as client:
            return client.hello(settings.host_timeout)


def well(details: str) -> Result:
    """All is as it should be."""
    return Result(Code.SUCCESS, details)


def warning(details: str) -> Result:
    """It can be done, but something is not what it could be."""
    return Result(Code.WARNING, details)


def failure(details: str) -> Result:
    """Something does not work."""
    return Result(Code.FAILURE, details)

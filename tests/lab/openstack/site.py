# SPDX-License-Identifier: Apache-2.0
"""What all services of the cloud know of each other: addresses, accounts, options in common."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.broker import Broker, free_ports
from tests.lab.openstack import configuration
from tests.lab.openstack.configuration import Options
from tests.lab.openstack.database import Database
from tests.lab.openstack.service import Services
from tests.lab.openstack.venv import VENV, program
from tests.unit.relay.wire.certificates import Authority

REGION = "lab"
ADMIN = "admin"
#: The account of all services, and the project of it.
SERVICE = "service"
#: Virtual host and user of OpenStack's services at the broker.
MESSAGING = "openstack"
#: Paths of the APIs, by the service's name.
PATHS = {
    "keystone": "/v3",
    "placement": "",
    "glance": "",
    "neutron": "",
    "cinder": "/v3",
    "nova": "/v2.1",
}
_THREADS = 4


@dataclass(frozen=True)
class Site:
    """The cloud under construction.

    :ivar directory: for the files of all services.
    :ivar password: of all accounts.
    :ivar authority: of hosts' certificates.
    :ivar ports: of the APIs, by the service's name.
    """

    directory: Path
    services: Services
    broker: Broker
    database: Database
    password: str
    authority: Authority
    ports: dict[str, int] = field(default_factory=dict)

    @classmethod
    def plan(cls, directory: Path, broker: Broker) -> "Site":
        """Choose ports and password; nothing is started."""
        services = Services(directory / "logs")
        password = secrets.token_hex(8)
        port, *ports = free_ports(1 + len(PATHS))
        # It ends when nobody needs it any more
        database = Database(Services(directory / "logs"), directory / "mariadb", port, password)
        ports_by_name = dict(zip(PATHS, ports, strict=True))
        certificates = directory / "certificates"
        certificates.mkdir()
        authority = Authority(certificates)
        return cls(directory, services, broker, database, password, authority, ports_by_name)

    def url(self, name: str) -> str:
        """Of an API, on this machine and on each host."""
        return f"http://127.0.0.1:{self.ports[name]}{PATHS[name]}"

    def messaging(self) -> str:
        """Transport URL of OpenStack's services."""
        return f"rabbit://{MESSAGING}:{self.password}@127.0.0.1:{self.broker.port}/{MESSAGING}"

    def configure(self, name: str, *parts: Options) -> Path:
        """Write a configuration with what all have in common; the file.

        :param name: the file's, with that of its directory.
        """
        path = self.directory / name
        return configuration.write(path, self._common(path.parent), *parts)

    def account(self) -> dict[str, object]:
        """Options of a group with which a service asks Keystone as itself."""
        return {
            "auth_type": "password",
            "auth_url": self.url("keystone"),
            "username": SERVICE,
            "password": self.password,
            "project_name": SERVICE,
            "user_domain_id": "default",
            "project_domain_id": "default",
            "region_name": REGION,
        }

    def administrator(self) -> dict[str, str]:
        """What a client has to know to be the administrator, by openstacksdk's names."""
        return {
            "auth_url": self.url("keystone"),
            "username": ADMIN,
            "password": self.password,
            "project_name": ADMIN,
            "user_domain_id": "default",
            "project_domain_id": "default",
        }

    def checks_tokens(self) -> Options:
        """The part of an API's configuration for the tokens that it is shown."""
        return {
            "keystone_authtoken": {
                **self.account(),
                "www_authenticate_uri": self.url("keystone"),
                "service_token_roles": SERVICE,
                "service_token_roles_required": True,
            }
        }

    def start_api(
        self, name: str, module: str, variables: dict[str, str], arguments: str = ""
    ) -> None:
        """Start the API of a service; `wait_for_api` waits until it listens.

        :param module: with the WSGI application.
        :param arguments: that the application finds as those of its program.
        """
        self.services.start(
            name,
            [program("uwsgi"), "--http-socket", f"127.0.0.1:{self.ports[name]}"]
            + ["--module", f"{module}:application", "--virtualenv", str(VENV), "--die-on-term"]
            + ["--enable-threads", "--threads", str(_THREADS), "--need-app"]
            # It does not know how to keep a connection
            + ["--add-header", "Connection: close", "--buffer-size", "65535"]
            + ["--http-auto-chunked", "--http-chunked-input", "--disable-logging"]
            + (["--pyargv", arguments] if arguments else []),
            variables=variables,
        )

    def wait_for_api(self, name: str) -> None:
        """:raises ServiceError: it has ended, or does not listen in time."""
        self.services.wait_for_port(name, self.ports[name])

    def _common(self, directory: Path) -> Options:
        return {
            "DEFAULT": {
                "transport_url": self.messaging(),
                "use_stderr": True,
                "state_path": directory / "state",
            },
            "oslo_concurrency": {"lock_path": directory / "locks"},
        }

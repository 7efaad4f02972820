# SPDX-License-Identifier: Apache-2.0
"""A private RabbitMQ that takes nothing but TLS, from who shows a certificate."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.lab.broker import Broker

# As the administration guide has it, but for the port
CONFIGURATION = """\
listeners.tcp = none
listeners.ssl.default = 127.0.0.1:{port}
ssl_options.cacertfile = {authority}
ssl_options.certfile = {certificate}
ssl_options.keyfile = {key}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2
"""


def available() -> str | None:
    """Why no broker can run on this machine, None if one can."""
    found = shutil.which("rabbitmqctl", path="/usr/sbin:/usr/bin")
    return None if found else "RabbitMQ is not installed"


class TlsBroker(Broker):
    """``certificate``, ``key``: the broker's. ``authority``: of its clients."""

    def __init__(
        self, instances: Iterable[str], certificate: str, key: str, authority: Path
    ) -> None:
        super().__init__(instances)
        text = CONFIGURATION.format(
            port=self.port, authority=authority, certificate=certificate, key=key
        )
        with (self._directory / "rabbitmq.conf").open("a") as file:
            file.write(text)

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        for name in ("RABBITMQ_NODE_IP_ADDRESS", "RABBITMQ_NODE_PORT"):
            del environment[name]  # they would make a listener without TLS
        return environment

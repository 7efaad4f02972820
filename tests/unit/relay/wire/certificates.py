# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests, made by the openssl command when they are needed."""

import ipaddress
import subprocess
from pathlib import Path

from nova_dmigrate.relay.wire.tls import TlsSettings

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2")


class Authority:
    """A certificate authority whose files are in ``directory``."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        self._directory = directory
        self._name = name
        constraint = "basicConstraints=critical,CA:TRUE"
        _make(self.certificate, self._key, name, "", constraint, ["-nodes"])

    def issue(self, *names: str, password: str = "") -> tuple[str, str]:
        """Return the files of a certificate for DNS names and addresses, and of its key.

        :param password: encrypts the key
        """
        stem = self._directory / f"{self._name}-{len(list(self._directory.iterdir()))}"
        certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        alternatives = "subjectAltName=" + ",".join(_alternative(name) for name in names)
        options = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        options += ["-passout", f"pass:{password}"] if password else ["-nodes"]
        _make(certificate, key, names[0], alternatives, "basicConstraints=CA:FALSE", options)
        return str(certificate), str(key)

    def settings(self, *names: str, peer: str) -> TlsSettings:
        """Return the settings of a host called ``names`` that expects ``peer``."""
        certificate, key = self.issue(*names)
        return TlsSettings(str(self.certificate), certificate, key, peer)


def _alternative(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"


def _make(
    certificate: Path, key: Path, name: str, names: str, constraint: str, options: list[str]
) -> None:
    command = ["openssl", "req", "-x509", *_NEW_KEY, "-subj", f"/CN={name}", *options]
    for extension in filter(None, (names, constraint)):
        command += ["-addext", extension]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)

# SPDX-License-Identifier: Apache-2.0
"""Hosts as they are written, where others take them apart."""

import urllib.parse

from nova_dmigrate.migration import orchestrator, service
from tests import base


class NamesTest(base.TestCase):
    def test_a_host_of_a_uri_is_called_as_it_is_written(self) -> None:
        for uri, name in (
            ("qemu+tls://Compute-2.example.org/system", "Compute-2.example.org"),
            ("qemu+ssh://Compute-2@compute-2:22/system", "compute-2"),
            ("qemu+ssh://root@Compute-2:22/system?keyfile=/Compute-2", "Compute-2"),
            ("qemu:///system", None),
        ):
            self.assertEqual(name, service._host_of(uri, 1.0), uri)

    def test_libvirt_can_parse_the_way_to_any_address(self) -> None:
        for address, host in (
            ("192.0.2.7", "192.0.2.7"),
            ("fd00::5", "fd00::5"),
            ("compute-2.example.org", "compute-2.example.org"),
        ):
            # As libvirt does with what has no slashes
            uri = orchestrator._tcp(address).replace("tcp:", "tcp://", 1)
            parts = urllib.parse.urlsplit(uri)
            self.assertEqual((host, None), (parts.hostname, parts.port), uri)

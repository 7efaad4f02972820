# SPDX-License-Identifier: Apache-2.0
"""What tests make different from a migration that goes well."""

from collections.abc import Callable
from typing import Any

import fixtures
from nova.tests.fixtures import libvirt as fakelibvirt

from nova_dmigrate import exception
from tests.functional import base

Change = Callable[[base.MigrationTest], None]

_PCI_DEVICE = """
<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source></hostdev>
"""


def nothing(test: base.MigrationTest) -> None:
    pass


def changed(host: str, **fields: Any) -> Change:
    """A host service says something else of its host."""

    def change(test: base.MigrationTest) -> None:
        test.hosts[host].hello_changes = fields

    return change


def relay(host: str, state: str, message: str = "") -> Change:
    """The relay of a host is so."""

    def change(test: base.MigrationTest) -> None:
        test.hosts[host].state, test.hosts[host].message = state, message

    return change


def unreadable(why: str) -> Change:
    """The destination's relay can read no volume."""

    def change(test: base.MigrationTest) -> None:
        test.hosts["dest"].trouble = why

    return change


def refused(host: str, request: str, code: str) -> Change:
    """A host service does not do what it is asked."""

    def change(test: base.MigrationTest) -> None:
        error = exception.RequestRefused(reason="it does not want to", code=code)
        test.hosts[host].refused[request] = error

    return change


def configured(group: str, **options: object) -> Change:
    return lambda test: test.configure(group, **options)


def device_passed_through(test: base.MigrationTest) -> None:
    test.devices.append(_PCI_DEVICE)


def agent_refuses(test: base.MigrationTest) -> None:
    test.agent.refused["ping"] = exception.RequestRefused(reason="not you", code="forbidden")


def monitor_fails(test: base.MigrationTest) -> None:
    def fail() -> str:
        raise fakelibvirt.make_libvirtError(
            fakelibvirt.libvirtError, "it is busy", error_code=fakelibvirt.VIR_ERR_INTERNAL_ERROR
        )

    test.monitor = fail


def state_directory_is_a_file(test: base.MigrationTest) -> None:
    test.configure("host", state_directory=test.file)


def broken(test: base.MigrationTest) -> None:
    test.useFixture(
        fixtures.MockPatch(
            "nova_dmigrate.virt.volumes.of_destination", side_effect=ZeroDivisionError("oops")
        )
    )

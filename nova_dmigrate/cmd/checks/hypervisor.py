# SPDX-License-Identifier: Apache-2.0
"""libvirt and QEMU of this host."""

from oslo_upgradecheck.upgradecheck import Result

from nova_dmigrate import exception
from nova_dmigrate.cmd.checks.base import CheckedHost, failure, warning, well
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.preflight import version_text


def versions(host: CheckedHost) -> Result:
    """They can migrate over the sockets of relays."""
    uri = host.libvirt_uri
    if not uri:
        return well("[host]libvirt_uri is empty: no libvirt is asked")
    try:
        from nova_dmigrate.migration.libvirt_guest import hypervisor_of
    except ImportError as error:
        return failure(f"The Python binding of libvirt cannot be used: {error}")
    try:
        found = hypervisor_of(uri)
        preflight.libvirt_can(found.libvirt_version, uri, uri)
    except exception.HypervisorError as error:
        return failure(f"{error} (see [host]libvirt_uri)")
    except exception.FallBack as error:
        return failure(f"All migrations are ordinary ones: {error.kwargs['reason']}")
    if found.kind != "QEMU":
        return failure(f"libvirt at {uri} has no QEMU but {found.kind} (see [host]libvirt_uri)")
    both = f"libvirt {version_text(found.libvirt_version)}, QEMU {version_text(found.version)}"
    untried = preflight.untried_qemu(found.version)
    if untried is not None:
        return warning(f"{both}: {untried}")
    return well(both)

# SPDX-License-Identifier: Apache-2.0
"""The host services: this host's, and those of hosts with which it exchanges guests."""

import dataclasses

from oslo_upgradecheck.upgradecheck import Result

from nova_dmigrate import exception
from nova_dmigrate.cmd.checks.base import CheckedHost, failure, warning, well
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.fallback import Reason
from nova_dmigrate.relay.wire.hello import VERSIONS
from nova_dmigrate.rpc.host_messages import HOST, HostState


def own(host: CheckedHost) -> Result:
    """The service of this host can be asked, runs what is installed, and takes migrations."""
    name = host.name
    installed = f"this installation: requests {HOST.version}, wire {_numbers(VERSIONS)}"
    try:
        state = host.ask(name)
        preflight.host_ready(state, name)
    except exception.HostUnreachable as error:
        return failure(f"{error} (see [host]name and [DEFAULT]transport_url)")
    except exception.HostRefused as error:
        if error.kwargs["code"] == "version":
            return warning(f"{error}. It has to be started anew, for {installed}")
        return failure(str(error))
    except exception.FallBack as error:
        return warning(_reason(error))
    versions = _versions(state)
    if state.version != HOST.version or tuple(state.wire_versions) != VERSIONS:
        return warning(
            f"The service of host {name} is of another version: {versions}; {installed}. It has to"
            " be started anew"
        )
    # Without Ceph's modules, for one, there is no rbd
    drivers = ", ".join(state.drivers) or "no driver"
    return well(f"The service of host {name} answers: {versions}, reads volumes by {drivers}")


def others(host: CheckedHost) -> Result:
    """Migrations between this host and those that were named can go through relays."""
    if not host.peers:
        return well("No other host was named (--peer)")
    try:
        here = host.ask(host.name)
    except exception.HostError as error:
        return warning(f"Not checked, since the service of this host does not tell. {error}")
    found, wrong = [], []
    for name in host.peers:
        try:
            there = host.ask(name)
            preflight.host_ready(there, name)
            preflight.hosts_compatible(here, there, name)
        except exception.HostError as error:
            wrong.append(str(error))
        except exception.FallBack as error:
            detail = ""
            if error.kwargs["code"] == Reason.WIRE_DIFFERS.code:
                here_has, there_has = _numbers(here.wire_versions), _numbers(there.wire_versions)
                detail = f" ({host.name} has {here_has}, {name} has {there_has})"
            wrong.append(f"Host {name}: {_reason(error)}{detail}")
        else:
            if not dataclasses.replace(HOST, version=here.version).speaks(there.needs):
                wrong.append(
                    f"Host {name}: its requests are of version {there.needs}, which the service"
                    f" of host {host.name} does not know: it speaks {here.version}"
                )
            else:
                found.append(f"host {name}: {_versions(there)}")
    if wrong:
        return warning(f"Migrations will be ordinary ones. {'. '.join(wrong)}")
    return well("; ".join(found))


def _versions(state: HostState) -> str:
    return f"requests {state.version}, wire {_numbers(state.wire_versions)}"


def _numbers(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions))


def _reason(error: exception.FallBack) -> str:
    return str(error.kwargs["reason"])

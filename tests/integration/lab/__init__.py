# SPDX-License-Identifier: Apache-2.0
"""The integration lab: a tiny real guest in real QEMUs, hosts as network namespaces, and what measures them."""

from tests.integration.lab.beats import HeartbeatRecorder
from tests.integration.lab.guest import Guest, GuestError, GuestSpec
from tests.integration.lab.hosts import Host, HostPair
from tests.integration.lab.image import create_disk, guest_image
from tests.integration.lab.memory import compare_ram, differing_pages
from tests.integration.lab.processes import end, spawn, terminate, workspace
from tests.integration.lab.qmp import QMPClient, QMPClosed, QMPError

__all__ = [
    "Guest",
    "GuestError",
    "GuestSpec",
    "HeartbeatRecorder",
    "Host",
    "HostPair",
    "QMPClient",
    "QMPClosed",
    "QMPError",
    "compare_ram",
    "create_disk",
    "differing_pages",
    "end",
    "guest_image",
    "spawn",
    "terminate",
    "workspace",
]

# SPDX-License-Identifier: Apache-2.0
"""The integration lab: a tiny guest in real QEMUs, hosts as namespaces, and what measures them."""

from tests.integration.lab.beats import HeartbeatRecorder
from tests.integration.lab.guest import Guest, GuestError, GuestSpec
from tests.integration.lab.hosts import Host, HostPair
from tests.integration.lab.image import create_disk, guest_image
from tests.integration.lab.memory import compare_ram, differing_pages
from tests.integration.lab.processes import end, spawn, terminate, workspace
from tests.integration.lab.qmp import QMPClient, QMPClosed, QMPError
from tests.integration.lab.tap import StreamTap, replay_stream, stream_mismatches

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
    "StreamTap",
    "compare_ram",
    "create_disk",
    "differing_pages",
    "end",
    "guest_image",
    "replay_stream",
    "spawn",
    "stream_mismatches",
    "terminate",
    "workspace",
]

# SPDX-License-Identifier: Apache-2.0
"""The integration lab: a tiny guest in real QEMUs, hosts as namespaces, and what measures them."""

from tests.lab.beats import HeartbeatRecorder
from tests.lab.guest import Guest, GuestError, GuestSpec
from tests.lab.hosts import Host, HostPair
from tests.lab.image import create_disk, guest_image
from tests.lab.memory import compare_ram, differing_pages
from tests.lab.processes import end, spawn, terminate, workspace
from tests.lab.qmp import QMPClient, QMPClosed, QMPError
from tests.lab.tap import StreamTap, replay_stream, stream_mismatches

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

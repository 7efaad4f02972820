# SPDX-License-Identifier: Apache-2.0
"""Plugs the tap devices that Nova makes on a host into the bridge of the lab's guests."""

from tests.lab.guest_network import BRIDGE
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.openstack.service import Services

# A tap appears with its name; there is no telling when, so it looks again and again
_SCRIPT = f"""
while sleep 0.2; do
    for tap in /sys/class/net/tap*; do
        if [ -e "$tap" ] && [ ! -e "$tap/brport" ]; then
            ip link set "${{tap##*/}}" master {BRIDGE} up && echo "${{tap##*/}}"
        fi
    done
done
"""


def start(services: Services, host: LibvirtHost) -> None:
    """Plug what comes from now on."""
    services.start(f"taps-{host.name}", ["bash", "-c", _SCRIPT], host)

# SPDX-License-Identifier: Apache-2.0
"""What a guest, and the hosts, may do at RabbitMQ.

Permissions of RabbitMQ hold for a virtual host. Within one, users cannot be kept apart enough: an
answer goes through the default exchange, and who may write to that reaches any queue there by its
name. So each instance has a **virtual host of its own**, with two users: the guest's, which
exists in no other one, and that of the hosts, which are the only ones in all of them. Within it
the guest is still held to its agent's queues: it cannot read the queue in which the hosts expect
answers.

The limits keep a guest from filling the broker: connections, queues, and bytes in each queue.

The services of the hosts share a virtual host, which no guest's user can enter.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from nova_dmigrate.rpc import messages

MAX_CONNECTIONS = 32
MAX_QUEUES = 32
# One queue holds a few of the largest messages, for no longer than anybody waits for an answer
MAX_QUEUE_BYTES = 8 * messages.MAX_MESSAGE_BYTES
MESSAGE_TTL = 60_000  # milliseconds

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_AGENT_QUEUES = r"dmigrate-agent(\..+)?|dmigrate-agent_fanout(_.+)?"
_REPLY_QUEUES = r"reply_[0-9a-f]{32}"
_SERVICE_QUEUES = r"dmigrate-host(\..+)?|dmigrate-host_fanout(_.+)?"


@dataclasses.dataclass(frozen=True)
class Permissions:
    """Regular expressions of the queues and exchanges that a user may configure, write, read."""

    configure: str
    write: str
    read: str


# The default exchange ("amq.default") carries the agent's answers to the hosts
GUEST = Permissions(
    configure=rf"^(dmigrate|{_AGENT_QUEUES})$",
    write=rf"^(amq\.default|{_AGENT_QUEUES})$",
    read=rf"^(dmigrate|{_AGENT_QUEUES})$",
)
HOST = Permissions(
    configure=rf"^(dmigrate|{_REPLY_QUEUES})$",
    write=rf"^(dmigrate|{_REPLY_QUEUES})$",
    read=rf"^({_REPLY_QUEUES})$",
)


#: Virtual host of the host services, and what their user may do in it: to serve and to ask.
SERVICES = "nova-dmigrate"
SERVICE = Permissions(
    configure=rf"^(dmigrate|{_SERVICE_QUEUES}|{_REPLY_QUEUES})$",
    write=rf"^(amq\.default|dmigrate|{_SERVICE_QUEUES}|{_REPLY_QUEUES})$",
    read=rf"^(dmigrate|{_SERVICE_QUEUES}|{_REPLY_QUEUES})$",
)


def virtual_host(instance: str) -> str:
    """Name of an instance's virtual host.

    :raises ValueError: if ``instance`` is not a UUID in its canonical form.
    """
    if not _UUID.fullmatch(instance):
        raise ValueError(f"{instance!r} is not the UUID of an instance")
    return f"dmigrate-{instance}"


def guest_user(instance: str) -> str:
    """Name of the guest's user at the broker."""
    return virtual_host(instance)


def commands(instance: str, password: str, host_user: str) -> list[list[str]]:
    """Arguments of rabbitmqctl, one call each, that let an instance's agent be asked."""
    vhost, user = virtual_host(instance), guest_user(instance)
    limits = {"max-connections": MAX_CONNECTIONS, "max-queues": MAX_QUEUES}
    return [
        ["add_vhost", vhost],
        ["set_vhost_limits", "-p", vhost, json.dumps(limits)],
        ["set_policy", "-p", vhost, "bounds", ".*", json.dumps(_bounds()), "--apply-to", "queues"],
        ["add_user", user, password],
        ["set_permissions", "-p", vhost, user, GUEST.configure, GUEST.write, GUEST.read],
        ["set_permissions", "-p", vhost, host_user, HOST.configure, HOST.write, HOST.read],
    ]


def removal(instance: str) -> list[list[str]]:
    """Arguments of rabbitmqctl that remove all of it, with the guest's connections."""
    return [
        ["delete_user", guest_user(instance)],
        ["delete_vhost", virtual_host(instance)],
    ]


def definitions(instance: str, host_user: str) -> dict[str, list[dict[str, Any]]]:
    """The same as ``commands`` but for the users, as RabbitMQ's definitions (JSON)."""
    vhost = virtual_host(instance)
    return {
        "vhosts": [{"name": vhost}],
        "permissions": [
            {"vhost": vhost, "user": guest_user(instance), **dataclasses.asdict(GUEST)},
            {"vhost": vhost, "user": host_user, **dataclasses.asdict(HOST)},
        ],
        "policies": [
            {
                "vhost": vhost,
                "name": "bounds",
                "pattern": ".*",
                "apply-to": "queues",
                "definition": _bounds(),
                "priority": 0,
            }
        ],
    }


def service_commands(host_user: str) -> list[list[str]]:
    """Arguments of rabbitmqctl, one call each, that let host services be asked."""
    permissions = (SERVICE.configure, SERVICE.write, SERVICE.read)
    return [
        ["add_vhost", SERVICES],
        ["set_permissions", "-p", SERVICES, host_user, *permissions],
    ]


def service_definitions(host_user: str) -> dict[str, list[dict[str, Any]]]:
    """The same as RabbitMQ's definitions (JSON)."""
    return {
        "vhosts": [{"name": SERVICES}],
        "permissions": [
            {"vhost": SERVICES, "user": host_user, **dataclasses.asdict(SERVICE)},
        ],
    }


def _bounds() -> dict[str, Any]:
    return {
        "max-length-bytes": MAX_QUEUE_BYTES,
        "message-ttl": MESSAGE_TTL,
        "overflow": "reject-publish",
    }

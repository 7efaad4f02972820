# SPDX-License-Identifier: Apache-2.0
"""A server whose owner takes the agent's credentials, and wants to be another instance at the
broker.
"""

import dataclasses
import json
import time

from nova_dmigrate import exception
from nova_dmigrate.rpc import isolation
from tests.lab.broker import HOST_USER
from tests.lab.guest_network import CLIENTS_ADDRESS
from tests.lab.openstack.account import AgentAccount
from tests.lab.openstack.deeds import Done
from tests.lab.openstack.scene import Scene
from tests.lab.openstack.site import MESSAGING

#: Seconds for which it is looked whether it is asked, once it has been refused.
_LOOKS = 10
#: Who comes in, in the server: user, password and virtual host of each attempt.
_ATTEMPTS = """
import amqp, json, sys
address, attempts = json.load(sys.stdin)
for name, (user, password, host) in attempts.items():
    try:
        amqp.Connection(address, user, password, virtual_host=host, connect_timeout=30).connect()
    except Exception as error:
        attempts[name] = type(error).__name__
    else:
        attempts[name] = "in"
print(json.dumps(attempts))
"""
#: What the broker says of user or password, and of a virtual host: no other error is a refusal.
_REFUSED = ("AccessRefused", "NotAllowed")
#: An agent of that name serves beside the server's own.
_IMPOSTOR = """
mkdir -p /run/impostor
cat >/run/impostor/agent.conf <<END
[DEFAULT]
transport_url = {url}
[agent]
instance = {instance}
transport = broker
state_directory = /run/impostor/state
sql_password_file = /run/payload/password
END
setsid python3 -m nova_dmigrate.cmd.agent --config-file /run/impostor/agent.conf serve \
    </dev/null >/run/impostor/log 2>&1 &
echo $! >/run/impostor/pid
for _ in $(seq 120); do
    if grep -q NOT_ALLOWED /run/impostor/log; then exit; fi
    sleep 1
done
tail -n 20 /run/impostor/log
exit 1
"""


@dataclasses.dataclass(frozen=True)
class Isolated:
    """The server has its own credentials, and tries the names of another one's; an agent with the
    other one's id serves in it. That this would be noticed is tried at last: the broker is told to
    let it in.
    """

    def __str__(self) -> str:
        return (
            "the broker lets the server in as itself alone; what a host asks the other instance"
            " does not reach it"
        )

    def __call__(self, scene: Scene) -> Done:
        own = scene.working.database.account
        with scene.neighbour() as other:
            account = AgentAccount(scene.cloud.broker)
            account.make(other.id)
            try:
                entered = _attempts(scene, other.id)
                wrong = [f"{name}: {result}" for name, result in entered.items()
                         if result not in (["in"] if name == "itself" else _REFUSED)]  # fmt: skip
                url = own.url(CLIENTS_ADDRESS, scene.server.id)
                url = f"{url.rpartition('/')[0]}/{isolation.virtual_host(other.id)}"
                reached = _impostor(scene, account, url, other.id)
            finally:
                account.remove()
        tried = ", ".join(f"{name}: {result}" for name, result in entered.items())
        asked = "reach it" if reached else "do not reach it"
        was = f"{tried}; the other instance's questions {asked}"
        return Done(was, [*wrong, *([f"questions {asked}"] if reached else [])])


def _attempts(scene: Scene, other: str) -> dict[str, str]:
    """What becomes of each attempt to enter the broker from the server."""
    broker, own = scene.cloud.broker, scene.working.database.account
    user, host = isolation.guest_user(scene.server.id), isolation.virtual_host(scene.server.id)
    attempts = {
        "itself": (user, own.password, host),
        "the other's virtual host": (user, own.password, isolation.virtual_host(other)),
        "the other's name": (
            isolation.guest_user(other), own.password, isolation.virtual_host(other),
        ),
        "the other's name at home": (isolation.guest_user(other), own.password, host),
        "the hosts' name": (HOST_USER, own.password, isolation.SERVICES),
        "the host services": (user, own.password, isolation.SERVICES),
        "OpenStack": (user, own.password, MESSAGING),
    }  # fmt: skip
    told = json.dumps([f"{CLIENTS_ADDRESS}:{broker.port}", attempts])
    script = f"python3 -c '{_ATTEMPTS}' <<'END'\n{told}\nEND\n"
    entered: dict[str, str] = json.loads(scene.working.database.run(script))
    return entered


def _impostor(scene: Scene, account: AgentAccount, url: str, other: str) -> bool:
    """Whether an agent in the server that says it is the other one is asked what is for that.

    :raises ShellError: the broker has not refused it.
    :raises CloudError: it is not even asked when the broker lets it in.
    """
    database, broker = scene.working.database, scene.cloud.broker
    host, user = isolation.virtual_host(other), isolation.guest_user(scene.server.id)
    reached = False
    try:
        database.run(_IMPOSTOR.format(url=url, instance=other))
        end = time.monotonic() + _LOOKS
        while time.monotonic() < end and not reached:
            reached = account.served() or _answers(account)
        allowed = dataclasses.astuple(isolation.GUEST)
        broker.control("set_permissions", "-p", host, user, *allowed)
        scene.cloud.client.wait(
            lambda: _answers(account), "it would have been noticed if it had been let in"
        )
    finally:
        database.run("kill $(</run/impostor/pid) || true")
    return reached


def _answers(account: AgentAccount) -> bool:
    """Whether any agent answers for the instance."""
    try:
        with account.agent() as agent:
            agent.ping()
    except exception.AgentUnreachable:
        return False
    return True

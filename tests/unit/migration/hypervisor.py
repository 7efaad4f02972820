# SPDX-License-Identifier: Apache-2.0
"""libvirt's own hypervisor for tests, which runs whatever domain it is told of, and cannot migrate
it; and host services and agents that are met where requests leave this process.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.rpc import host_messages, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_messages import HOST
from nova_dmigrate.rpc.messages import AGENT
from nova_dmigrate.rpc.protocol import Protocol
from nova_dmigrate.rpc.transport import Transport

NAME, UUID = "db1", "6f1d2c3b-4a59-4687-9b1c-0123456789ab"
PORT = """
<channel type='unix'><source mode='bind' path='/run/guests/agent.sock'/>
  <target type='virtio' name='org.openstack.dmigrate.0'/></channel>"""
DEVICE = """
<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source></hostdev>"""
_NODE = """
<node>
  <cpu><mhz>1000</mhz><model>i686</model><active>1</active><nodes>1</nodes><sockets>1</sockets>
    <cores>1</cores><threads>1</threads></cpu>
  <memory>8192000</memory>
  <domain type='test'>
    <name>{name}</name><uuid>{uuid}</uuid><memory>65536</memory><vcpu>1</vcpu>
    <os><type>hvm</type></os>
    <devices>{devices}</devices>
  </domain>
</node>"""


def disk(target: str, cache: str = "none") -> str:
    """A raw file with a serial, both of that name."""
    return f"""
<disk type='file' device='disk'><driver name='qemu' type='raw' cache='{cache}'/>
  <source file='/run/guests/{target}'/><target dev='{target}' bus='virtio'/>
  <serial>{target}</serial></disk>"""


def hypervisor(directory: Path, *devices: str) -> str:
    """The URI of a libvirt with one domain, which has those devices."""
    node = directory / "node.xml"
    node.write_text(_NODE.format(name=NAME, uuid=UUID, devices="".join(devices)))
    return f"test://{node}"


def host_state(host: str, **values: Any) -> host_messages.HostState:
    """What a host says that is ready."""
    state: dict[str, Any] = {
        "host": host,
        "version": HOST.version,
        "wire_versions": (1,),
        "incarnation": "1",
        "tls": True,
        "drivers": ("block",),
        "relays": 0,
        "max_relays": 4,
        "queued": 0,
        "draining": False,
        "migration_address": None,
        "socket_directory": "/run/nova-dmigrate",
    }
    return host_messages.HostState(**state | values)


class Agent:
    """An agent that has found something."""

    def __init__(self, *findings: messages.Finding) -> None:
        self._findings = findings

    def describe(self, arguments: Any) -> messages.Description:
        return messages.Description("1", 1 << 30, 0.5, (), self._findings)


class Host:
    """The service of a host, through which agents are reached.

    :ivar asked: what methods agents were asked for; :ivar agent: None for one that is away.
    """

    def __init__(self, state: host_messages.HostState, agent: Agent | None = None) -> None:
        self._state = state
        self.agent_here = agent
        self.asked: list[str] = []

    def hello(self, arguments: Any) -> host_messages.HostState:
        return self._state

    def agent(self, request: host_messages.AgentRequest) -> host_messages.AgentAnswer:
        self.asked.append(request.method)
        if self.agent_here is None:
            raise exception.RequestRefused(reason="it is away", code="agent-unreachable")
        answer = Dispatcher(self.agent_here, AGENT).answer(
            request.method, request.request_id, json.loads(request.arguments)
        )
        return host_messages.AgentAnswer(json.dumps(answer))


class Reached(fixtures.Fixture):
    """Those services, and no others, are reached over the broker."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        super().__init__()
        self._hosts = hosts

    def _setUp(self) -> None:
        def way(name: str, url: str, protocol: Protocol, conf: Any = None) -> Transport:
            return _Way(name, protocol, self._hosts.get(name))

        target = "nova_dmigrate.rpc.broker.BrokerTransport"
        self.useFixture(fixtures.MonkeyPatch(target, way))


class _Way(Transport):
    def __init__(self, name: str, protocol: Protocol, handler: Any) -> None:
        self._name = name
        self._protocol = protocol
        self._handler = handler

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        if self._handler is None:
            raise self._protocol.unreachable_error(self._name, "no answer in time")
        answer = Dispatcher(self._handler, self._protocol).answer(method, request_id, arguments)
        return json.loads(json.dumps(answer))

    def close(self) -> None:
        pass

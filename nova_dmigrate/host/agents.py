# SPDX-License-Identifier: Apache-2.0
"""Asks the agents of guests on this host on behalf of others, over their virtio-serial ports.

A guest that has just moved here can so be asked by whoever has moved it, from another host.
"""

import json
import threading
import time
import weakref
from collections.abc import Sequence

from nova_dmigrate import exception
from nova_dmigrate.host import permissions
from nova_dmigrate.rpc.channel import ChannelTransport, open_port
from nova_dmigrate.rpc.host_messages import MAX_ANSWER, AgentAnswer, AgentRequest
from nova_dmigrate.rpc.messages import AGENT


class AgentProxy:
    """Hands on one request at a time to each port: QEMU lets one at a time have it.

    :param directories: below which ports may be.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._ports: weakref.WeakValueDictionary[str, _Port] = weakref.WeakValueDictionary()

    def ask(self, request: AgentRequest) -> AgentAnswer:
        """The agent's answer.

        :raises RequestRefused: the agent cannot be reached, or not be asked that.
        """
        if request.method not in AGENT.methods:
            raise _refused(f"agents have no method {request.method}", "malformed")
        try:
            arguments = json.loads(request.arguments)
        except (ValueError, RecursionError) as error:
            raise _refused("the arguments are not JSON", "malformed") from error
        end = time.monotonic() + request.timeout
        path = permissions.channel(request.channel_path, self._directories)
        with self._lock:
            port = self._ports.setdefault(path, _Port())
        if not port.lock.acquire(timeout=request.timeout):
            raise _refused("others are asking it all the time", "agent-unreachable")
        transport = ChannelTransport(request.instance, lambda: open_port(path))
        try:
            answer = transport.call(
                request.method, request.request_id, arguments, end - time.monotonic()
            )
        except exception.AgentUnreachable as error:
            raise _refused(str(error), "agent-unreachable") from error
        finally:
            transport.close()
            port.lock.release()
        text = json.dumps(answer)
        if len(text) > MAX_ANSWER:
            raise _refused("the agent's answer is too long", "nonsense")
        return AgentAnswer(text)


class _Port:
    """Exists while somebody asks through it, or waits for that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def _refused(reason: str, code: str) -> exception.RequestRefused:
    return exception.RequestRefused(reason=reason, code=code)

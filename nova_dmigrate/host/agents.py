# SPDX-License-Identifier: Apache-2.0
"""Asks the agents of guests on this host on behalf of others, over their virtio-serial ports.

A guest that has just moved here can so be asked by whoever has moved it, from another host.
"""

import json
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.host import permissions
from nova_dmigrate.rpc.channel import ChannelTransport, open_port
from nova_dmigrate.rpc.host_messages import MAX_ANSWER, AgentAnswer, AgentRequest
from nova_dmigrate.rpc.messages import AGENT

#: Seconds for which a port stays open when it has been used: a guest that is busy takes its time to
#: notice that somebody has come, and whoever asks once mostly asks again.
_KEPT = 2.0


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
            port = self._ports.setdefault(path, _Port(path))
        if not port.lock.acquire(timeout=request.timeout):
            raise _refused("others are asking it all the time", "agent-unreachable")
        try:
            answer = port.ask(request, arguments, end)
        except exception.AgentUnreachable as error:
            raise _refused(str(error), "agent-unreachable") from error
        finally:
            port.lock.release()
        text = json.dumps(answer)
        if len(text) > MAX_ANSWER:
            raise _refused("the agent's answer is too long", "nonsense")
        return AgentAnswer(text)


class _Port:
    """Exists while somebody asks through it, or waits for that, and as long as it is open.

    All but the lock belongs to who has the lock.
    """

    def __init__(self, path: str) -> None:
        self.lock = threading.Lock()
        self._path = path
        self._transport: ChannelTransport | None = None
        self._used = 0.0
        self._watched = False  # whether something closes it when it is not used any more

    def ask(self, request: AgentRequest, arguments: dict[str, Any], end: float) -> Any:
        """The agent's answer, until ``end``.

        :raises AgentUnreachable: it has none.
        """
        if self._transport is not None:
            try:
                return self._ask(self._transport, request, arguments, end)
            except exception.AgentUnreachable:
                # The guest may have been stopped, and be another one by now
                self._close()
        self._transport = ChannelTransport(request.instance, lambda: open_port(self._path))
        try:
            return self._ask(self._transport, request, arguments, end)
        except exception.AgentUnreachable:
            self._close()
            raise

    def _ask(
        self,
        transport: ChannelTransport,
        request: AgentRequest,
        arguments: dict[str, Any],
        end: float,
    ) -> Any:
        answer = transport.call(
            request.method, request.request_id, arguments, end - time.monotonic()
        )
        self._used = time.monotonic()
        if not self._watched:
            self._watch()
        return answer

    def _watch(self) -> None:
        timer = threading.Timer(_KEPT, self._close_unused)
        timer.daemon = True
        timer.start()
        self._watched = True

    def _close_unused(self) -> None:
        with self.lock:
            self._watched = False
            if time.monotonic() >= self._used + _KEPT:
                self._close()
            else:
                self._watch()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def _refused(reason: str, code: str) -> exception.RequestRefused:
    return exception.RequestRefused(reason=reason, code=code)

# SPDX-License-Identifier: Apache-2.0
"""The asking side of every protocol: one request, sent again while unanswered, one record."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from nova_dmigrate.rpc import fields
from nova_dmigrate.rpc.protocol import Protocol, Refusal
from nova_dmigrate.rpc.transport import Transport

LOG = logging.getLogger(__name__)

T = TypeVar("T")


def _impatient() -> bool:
    return False


class Caller:
    """Asks one server, and believes nothing that it says.

    :param name: the instance of the agent, or the host.
    :param timeout: seconds for one answer; :param attempts: how often a request is sent at most;
        :param retry_delay: seconds between them: a server that is being restarted needs a moment.
    :param sleep: waits that many seconds.
    """

    def __init__(
        self,
        protocol: Protocol,
        name: str,
        transport: Transport,
        timeout: float,
        attempts: int,
        retry_delay: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._protocol = protocol
        self._name = name
        self._transport = transport
        self._timeout = timeout
        self._attempts = attempts
        self._retry_delay = retry_delay
        self._sleep = sleep

    def close(self) -> None:
        self._transport.close()

    def call(
        self,
        method: str,
        arguments: Any,
        attempts: int | None = None,
        timeout: float | None = None,
        patient: Callable[[], bool] = _impatient,
    ) -> Any:
        """The result of one request.

        :param patient: as in `insist`.
        :raises RpcError: the protocol's error for who is unreachable, or refuses.
        """
        request_id = uuid.uuid4().hex
        values = fields.to_dict(arguments)
        timeout = timeout or self._timeout
        answer = self.insist(
            method,
            lambda: self._transport.call(method, request_id, values, timeout),
            attempts,
            patient,
        )
        try:
            result = self._protocol.result_of(method, answer)
        except fields.Malformed as error:
            raise self.nonsense(method, str(error)) from error
        if isinstance(result, Refusal):
            raise self._protocol.refused_error(
                self._name, f"{method}: {result.message}", result.code
            )
        return result

    def insist(
        self,
        what: str,
        ask: Callable[[], T],
        attempts: int | None = None,
        patient: Callable[[], bool] = _impatient,
    ) -> T:
        """What ``ask`` returns, which is called once more while nobody is reached.

        :param what: its name, for the log.
        :param patient: asked when there have been as many attempts, whether there shall be another
            one all the same.
        :raises RpcError: as it does in the end.
        """
        left = attempts or self._attempts
        while True:
            left -= 1
            try:
                return ask()
            except self._protocol.unreachable as error:
                if left <= 0 and not patient():
                    raise
                LOG.info("%s once more: %s", what, error)
            self._sleep(self._retry_delay)

    def nonsense(self, method: str, what: str) -> Exception:
        """The error for an answer that cannot be."""
        return self._protocol.refused_error(
            self._name, f"its answer to {method} makes no sense: {what}", "nonsense"
        )

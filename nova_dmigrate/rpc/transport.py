# SPDX-License-Identifier: Apache-2.0
"""What a transport is to the client: one request, one answer, or the reason why there is none."""

from __future__ import annotations

import abc
from typing import Any


class Transport(abc.ABC):
    """A way to the agent of one instance."""

    @abc.abstractmethod
    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        """The answer as JSON gives it, unchecked.

        Asking again with the same ``request_id`` is safe.

        :raises AgentUnreachable: if none came within ``timeout`` seconds, or none can come.
        :raises AgentRefused: if the agent does not speak this version of the protocol.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give back connections; the transport cannot be used any more."""

# SPDX-License-Identifier: Apache-2.0
"""What a protocol is to transports, dispatcher and clients: names, methods, and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.rpc import fields
from nova_dmigrate.rpc.fields import checked, text, token


@dataclasses.dataclass(frozen=True)
class Method:
    """``remembered``: the answer is kept, so that a repeated request is not executed again.

    ``since``: the version that has it. A request asks for no more than that, so that all that an
    older server has goes on working.
    """

    arguments: type[Any]
    result: type[Any]
    remembered: bool = False
    since: str = "1.0"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An answer that says no. ``code`` is for programs, ``message`` for people."""

    code: str = checked(token())
    message: str = checked(text(1024))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """``version``: major and minor number. ``peer``: the keyword by which the errors name the
    other side; ``server``: what answers, as a noun for messages.

    ``topic`` and ``exchange`` are names at the broker, ``namespace`` keeps methods apart.
    """

    namespace: str
    version: str
    topic: str
    exchange: str
    methods: Mapping[str, Method]
    unreachable: type[exception.RpcError]
    refused: type[exception.RpcError]
    peer: str
    server: str

    def speaks(self, version: Any) -> bool:
        """Whether requests of that version are understood: same major, no newer minor number."""
        try:
            major, minor = (int(part) for part in str(version)[:16].split("."))
        except ValueError:
            return False
        own_major, own_minor = (int(part) for part in self.version.split("."))
        return major == own_major and minor <= own_minor

    def result_of(self, method: str, answer: Any) -> Any:
        """The record in an answer, or the `Refusal` in it.

        :raises fields.Malformed: if it is neither.
        """
        if not isinstance(answer, dict):
            raise fields.Malformed("the answer is not an object")
        if answer.get("error") is not None:
            return fields.parse(Refusal, answer["error"])
        return fields.parse(self.methods[method].result, answer.get("result"))

    def unreachable_error(self, name: str, reason: str) -> exception.RpcError:
        """Nothing came from the peer of that name."""
        return self.unreachable(**{self.peer: name, "reason": reason})

    def refused_error(self, name: str, reason: str, code: str) -> exception.RpcError:
        """The peer of that name said no, or nonsense."""
        return self.refused(**{self.peer: name, "reason": reason, "code": code})

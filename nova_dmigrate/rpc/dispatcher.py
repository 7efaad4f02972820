# SPDX-License-Identifier: Apache-2.0
"""The answering side of every transport: check, execute once, answer.

A request that is repeated with the same identifier, because its answer was lost or the broker
delivered it twice, gets the first one's answer. Errors travel as answers of their own (`code`,
`message`), never as exceptions of the transport: no side lets the other one choose a class.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.rpc import fields
from nova_dmigrate.rpc.protocol import Protocol

LOG = logging.getLogger(__name__)

Answer = dict[str, Any]

_REMEMBERED = 256
_MAX_REASON = 1000
_REQUEST_ID = fields.token()


class Dispatcher:
    """Executes requests on ``handler``, which has a method for each of the protocol's.

    Its methods take a record of arguments, return a record, and refuse with a DMigrateError whose
    keyword ``code``, if it has one, is the refusal's code. They may be called by several threads.
    """

    def __init__(self, handler: Any, protocol: Protocol) -> None:
        self._handler = handler
        self.protocol = protocol
        self._lock = threading.Lock()
        self._answers: collections.OrderedDict[tuple[str, str], concurrent.futures.Future[Answer]]
        self._answers = collections.OrderedDict()

    def answer(self, method: Any, request_id: Any, arguments: Any) -> Answer:
        """The answer to a request: ``{"result": {...}}`` or ``{"error": {...}}``. Never raises."""
        known = self.protocol.methods.get(method) if isinstance(method, str) else None
        if known is None:
            return refusal(
                "unknown-method", f"the {self.protocol.server} does not know this method"
            )
        try:
            request_id = _REQUEST_ID(request_id)
            record = fields.parse(known.arguments, arguments, strict=True)
        except fields.Malformed as error:
            return refusal("malformed", f"{method}: {error}")
        if not known.remembered:
            return self._execute(method, record)
        future, first = self._future((method, request_id))
        if first:
            future.set_result(self._execute(method, record))
        else:
            LOG.info("Request %s (%s) came again", request_id, method)
        return future.result()

    def _future(self, key: tuple[str, str]) -> tuple[concurrent.futures.Future[Answer], bool]:
        """Where the answer to a request is or will be, and whether the caller has to make it."""
        with self._lock:
            future = self._answers.get(key)
            if future is not None:
                self._answers.move_to_end(key)
                return future, False
            future = concurrent.futures.Future()
            self._answers[key] = future
            if len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
            return future, True

    def _execute(self, method: str, record: Any) -> Answer:
        try:
            result = getattr(self._handler, method)(record)
        except exception.DMigrateError as error:
            LOG.warning("%s: %s", method, error)
            return refusal(error.kwargs.get("code", "failed"), str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the requester gets an answer
            LOG.exception("%s failed", method)
            return refusal("failed", f"{method} failed: {type(error).__name__}: {error}")
        return {"result": fields.to_dict(result)}


def refusal(code: str, message: str) -> Answer:
    """An answer that says no."""
    return {"error": {"code": code, "message": message[:_MAX_REASON]}}

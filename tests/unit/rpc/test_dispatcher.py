# SPDX-License-Identifier: Apache-2.0
"""The answering side: checks, answers once, never raises."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.protocol import Refusal
from tests import base
from tests.unit.rpc.test_fields import JSON


class Handler:
    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def _answer(self, result: Any) -> Any:
        self.calls += 1
        self.go.wait()
        if self.error is not None:
            raise self.error
        return result

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        result: messages.Pong = self._answer(messages.Pong("1", "1.0", "abc"))
        return result

    def restore(self, arguments: messages.LeaseArguments) -> messages.LeaseState:
        state = messages.LeaseState(arguments.lease_id, "idle", True, 0.0, 0.0, str(self.calls))
        result: messages.LeaseState = self._answer(state)
        return result


class DispatcherTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.handler = Handler()
        self.dispatcher = Dispatcher(self.handler, messages.AGENT)

    def restore(self, request_id: str) -> Any:
        return self.dispatcher.answer("restore", request_id, {"lease_id": "x"})

    def test_a_request_is_answered(self) -> None:
        answer = self.dispatcher.answer("ping", "1", {})
        self.assertEqual("abc", answer["result"]["incarnation"])

    def test_what_is_not_of_the_protocol_is_refused(self) -> None:
        for method, request_id, arguments, code in (
            ("_answer", "1", {}, "unknown-method"),
            (["ping"], "1", {}, "unknown-method"),
            (None, "1", {}, "unknown-method"),
            ("ping", None, {}, "malformed"),
            ("ping", "x" * 65, {}, "malformed"),
            ("ping", "1", {"more": 1}, "malformed"),
            ("ping", "1", None, "malformed"),
            ("restore", "1", {}, "malformed"),
            ("restore", "1", {"lease_id": 3}, "malformed"),
        ):
            answer = self.dispatcher.answer(method, request_id, arguments)
            self.assertEqual(code, answer["error"]["code"])
        self.assertEqual(0, self.handler.calls)

    def test_a_repeated_request_is_executed_once(self) -> None:
        first = self.restore("one")
        self.assertEqual(first, self.restore("one"))
        self.assertEqual(1, self.handler.calls)
        self.restore("two")
        self.assertEqual(2, self.handler.calls)

    def test_a_request_repeated_while_it_is_executed_waits_for_the_answer(self) -> None:
        self.handler.go.clear()
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(self.restore("one"))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        self.handler.go.set()
        for thread in threads:
            thread.join()
        self.assertEqual(1, self.handler.calls)
        self.assertEqual([answers[0]] * 3, answers)

    def test_questions_are_asked_anew_each_time(self) -> None:
        for _ in range(2):
            self.dispatcher.answer("ping", "one", {})
        self.assertEqual(2, self.handler.calls)

    def test_only_so_many_answers_are_remembered(self) -> None:
        for number in range(400):
            self.restore(str(number))
        self.restore("399")
        self.assertEqual(400, self.handler.calls)
        self.assertEqual(256, len(self.dispatcher._answers))

    def test_errors_are_answers(self) -> None:
        for error, code in (
            (exception.AgentError(reason="no such lease", code="unknown-lease"), "unknown-lease"),
            (exception.ServerNotFound(reason="no such lease"), "failed"),
            (RuntimeError("no such lease" + "!" * 5000), "failed"),
        ):
            self.handler.error = error
            refused = self.dispatcher.answer("ping", "1", {})
            self.assertEqual(code, refused["error"]["code"])
            self.assertIn("no such lease", refused["error"]["message"])
            self.assertIsInstance(messages.AGENT.result_of("ping", refused), Refusal)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(JSON | st.sampled_from(sorted(messages.METHODS)), JSON, JSON)
    def test_anything_gets_an_answer(self, method: Any, request_id: Any, arguments: Any) -> None:
        answer = Dispatcher(Handler(), messages.AGENT).answer(method, request_id, arguments)
        self.assertEqual(1, len(answer))

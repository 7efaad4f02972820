# SPDX-License-Identifier: Apache-2.0
"""The host's side against agents that answer late, wrongly, or not at all."""

import base64
import contextlib
import dataclasses
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, MapLimits, VolumeExtents
from nova_dmigrate.rpc import client
from nova_dmigrate.rpc.transport import Transport
from tests import base
from tests.fetched_map import fetch_map
from tests.unit.rpc.test_fields import JSON

PONG = {"result": {"agent_version": "1", "version": "1.0", "incarnation": "abc"}}


class Then(list[Any]):
    """Answers one after the other; the last one stays."""


class Scripted(Transport):
    """Answers what it was given, method by method; exceptions are raised."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        self.asked.append((method, request_id, arguments))
        answer = self.answers[method]
        if isinstance(answer, Then):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(**arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        pass


def state(**values: Any) -> dict[str, Any]:
    whole = {
        "map_id": "m",
        "state": "ready",
        "chunks": 1,
        "pages": 1,
        "size": 100,
        "seconds": 0.1,
        "message": "",
    }
    return {"result": {**whole, **values}}


LOST = exception.AgentUnreachable(instance="i", reason="no answer in time")


class ClientTest(base.TestCase):
    def make(self, **answers: Any) -> client.AgentClient:
        self.transport = Scripted(map_end={"result": {}}, **answers)
        self.slept: list[float] = []
        self.now = 0.0

        def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

        return client.AgentClient(
            "i", self.transport, client.ClientSettings(map_timeout=10), lambda: self.now, sleep
        )

    def test_a_lost_answer_is_asked_for_again_as_the_same_request(self) -> None:
        self.assertEqual("abc", self.make(ping=Then([LOST, LOST, PONG])).ping().incarnation)
        self.assertEqual(1, len({asked[1] for asked in self.transport.asked}))
        self.assertEqual([0.5, 0.5], self.slept)

    def test_an_agent_that_never_answers_is_unreachable(self) -> None:
        made = self.make(ping=LOST)
        self.assertRaises(exception.AgentUnreachable, made.ping)
        self.assertEqual(3, len(self.transport.asked))

    def test_a_refusal_is_told_with_its_code(self) -> None:
        refused = {"error": {"code": "unknown-lease", "message": "it\nis not held"}}
        error = self.assertRaises(exception.AgentRefused, self.make(renew=refused).renew, "x")
        self.assertEqual("unknown-lease", error.kwargs["code"])
        self.assertIn("renew: it?is not held", str(error))

    def test_answers_that_make_no_sense_are_refusals(self) -> None:
        for answer in (None, 3, {}, {"result": {}}, {"result": None, "error": 5}, {"error": {}}):
            error = self.assertRaises(exception.AgentRefused, self.make(ping=answer).ping)
            self.assertEqual("nonsense", error.kwargs["code"])

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(st.sampled_from(["ping", "describe", "health", "prepare"]), JSON)
    def test_no_answer_raises_anything_else(self, method: str, value: Any) -> None:
        for answer in (value, {"result": value}, {"error": value}):
            with contextlib.suppress(exception.RpcError):
                getattr(self.make(**{method: answer}), method)()

    def test_a_warm_up_is_begun_and_tells_how_far_it_is(self) -> None:
        told = {"result": {"state": "running", "loaded": 7, "total": 10, "seconds": 1.5}}
        made = self.make(warm_up={"result": {"state": "waiting"}}, warm_up_state=told)
        self.assertIsNone(made.warm_up())
        self.assertEqual(
            {
                "state": "running",
                "code": None,
                "loaded": 7,
                "total": 10,
                "seconds": 1.5,
                "message": "",
            },
            made.warm_up_progress(),
        )

    def test_a_map_that_is_never_ready_is_given_up(self) -> None:
        made = self.make(map_begin=state(state="building"), map_state=state(state="building"))
        error = self.assertRaises(exception.AgentUnreachable, fetch_map, made)
        self.assertIn("10 s", str(error))
        self.assertEqual("map_end", self.transport.asked[-1][0])

    def test_an_outage_while_a_map_is_made_and_fetched_does_not_cost_it(self) -> None:
        page = np.zeros(1, np.uint64)
        extents = VolumeExtents("v", 1 << 30, page, page, page + np.uint64(4096))
        (*chunks,) = BufferMap.build([extents]).to_chunks()
        outage, ready = [LOST] * 8, state(chunks=len(chunks))
        made = self.make(
            map_begin=state(state="building"),
            map_state=Then([state(state="building"), *outage, ready]),
            map_chunk=lambda map_id, index: (
                outage.pop()
                if outage
                else {"result": {"index": index, "data": base64.b64encode(chunks[index]).decode()}}
            ),
        )
        self.assertEqual(1, fetch_map(made).page_count)
        self.assertEqual([], outage)

    def test_an_agent_that_is_gone_while_it_makes_a_map_is_told_as_such(self) -> None:
        made = self.make(map_begin=state(state="building"), map_state=LOST)
        error = self.assertRaises(exception.AgentUnreachable, fetch_map, made)
        self.assertIn("no answer in time", str(error))
        self.assertGreaterEqual(self.now, 10)

    def test_chunks_are_asked_for_one_by_one_and_never_larger_than_agreed(self) -> None:
        big = base64.b64encode(bytes(5000)).decode()
        made = self.make(map_begin=state(), map_chunk={"result": {"index": 0, "data": big}})
        limits = MapLimits(max_chunk_bytes=4096)
        self.assertRaises(exception.AgentRefused, fetch_map, made, limits)
        self.assertEqual(4096, self.transport.asked[0][2]["max_chunk_bytes"])

    def test_a_map_that_claims_more_pages_than_allowed_is_not_fetched(self) -> None:
        made = self.make(map_begin=state(pages=101), map_chunk=LOST)
        error = self.assertRaises(
            exception.BufferMapError, fetch_map, made, MapLimits(max_pages=100)
        )
        self.assertIn("101 pages", str(error))
        self.assertEqual(["map_begin", "map_end"], [asked[0] for asked in self.transport.asked])

    def test_chunks_that_come_too_slowly_are_given_up(self) -> None:
        page = np.arange(0, 40000, 2, dtype=np.uint64) * 4096
        extents = VolumeExtents("v", 1 << 30, page, page[::-1], np.full(page.size, 4096, np.uint64))
        chunks = list(BufferMap.build([extents]).to_chunks(4096))
        self.assertGreater(len(chunks), 10)
        took = 0.1

        def chunk(map_id: str, index: int) -> dict[str, Any]:
            self.now += took
            return {"result": {"index": index, "data": base64.b64encode(chunks[index]).decode()}}

        made = self.make(map_begin=state(chunks=len(chunks), pages=page.size), map_chunk=chunk)
        self.assertEqual(page.size, fetch_map(made).page_count)
        took = 4
        made = self.make(map_begin=state(chunks=len(chunks), pages=page.size), map_chunk=chunk)
        error = self.assertRaises(exception.AgentUnreachable, fetch_map, made)
        self.assertIn(f"3 of {len(chunks)} chunks", str(error))
        self.assertIn("10 s", str(error))
        self.assertEqual("map_end", self.transport.asked[-1][0])

    def test_wrong_chunks_are_refused(self) -> None:
        for chunk in (
            {"index": 1, "data": "AAAA"},
            {"index": 0, "data": "!!!!"},
            {"index": 0, "data": "AAA"},
            {"index": 0, "data": "ÄÄÄÄ"},
        ):
            made = self.make(map_begin=state(), map_chunk={"result": chunk})
            self.assertRaises(exception.AgentRefused, fetch_map, made)

    def test_chunks_that_are_no_map_are_a_map_error(self) -> None:
        made = self.make(map_begin=state(), map_chunk={"result": {"index": 0, "data": "AAAA"}})
        self.assertRaises(exception.BufferMapError, fetch_map, made)
        made = self.make(map_begin=state(chunks=0))
        self.assertRaises(exception.BufferMapError, fetch_map, made)

    def test_an_agent_that_keeps_forgetting_its_map_is_asked_twice_at_most(self) -> None:
        gone = {"error": {"code": "unknown-map", "message": "there is no map m"}}
        made = self.make(map_begin=state(), map_chunk=gone)
        self.assertRaises(exception.AgentRefused, fetch_map, made)
        begun = [asked for asked in self.transport.asked if asked[0] == "map_begin"]
        self.assertEqual(2, len(begun))

    # By the service of a host

    def saved(self, *steps: Any, chunks: int = 4) -> client.AgentClient:
        """Of an agent whose map is ready; ``steps`` are what becomes of each request to save chunks
        of it: how many there are then, or an error.
        """
        self.steps = list(steps)
        self.saves: list[client.MapFile] = []
        made = self.make(map_begin=state(chunks=chunks))

        def save(map_id: str, count: int, file: client.MapFile, timeout: float) -> client.MapFile:
            self.assertEqual(("m", chunks, 10.0), (map_id, count, timeout))
            self.saves.append(file)
            step = self.steps.pop(0)
            if isinstance(step, Exception):
                raise step
            return dataclasses.replace(file, chunks=step, size=100 * step)

        made._saver = save
        self.path = self.make_directory() / "map"
        return made

    def test_chunks_are_saved_by_the_host_until_all_are_there(self) -> None:
        made = self.saved(3, 4)
        self.assertEqual(4, made.save_map(self.path, MapLimits()).chunks)
        self.assertEqual([(0, 0), (3, 300)], [(each.chunks, each.size) for each in self.saves])
        self.assertEqual(0o600, self.path.stat().st_mode & 0o777)
        self.assertEqual(["map_begin", "map_end"], [asked[0] for asked in self.transport.asked])

    def test_chunks_that_could_not_be_saved_are_asked_for_again_from_there(self) -> None:
        made = self.saved(1, *[LOST] * 8, 4)
        made.save_map(self.path, MapLimits())
        self.assertEqual([0, *[1] * 9], [each.chunks for each in self.saves])

    def test_an_outage_while_a_map_is_not_wanted_any_more_is_not_waited_for(self) -> None:
        made = self.saved(1, *[LOST] * 8)
        error = self.assertRaises(
            exception.AgentRefused,
            *(made.save_map, self.path, MapLimits(), lambda: len(self.saves) < 5),
        )
        self.assertEqual("not-wanted", error.kwargs["code"])
        self.assertEqual(5, len(self.saves))

    def test_after_any_error_there_is_no_file(self) -> None:
        refused = exception.AgentRefused(instance="i", reason="no", code="agent-refused")
        for error, steps in (
            # In all the time that there is
            (exception.AgentUnreachable, (1, *[LOST] * 21)),
            (exception.AgentRefused, (1, refused)),
            (OSError, (1, OSError("no space"))),
        ):
            made = self.saved(*steps)
            self.assertRaises(error, made.save_map, self.path, MapLimits())
            self.assertEqual([], self.steps)
            self.assertFalse(self.path.exists())
            self.assertEqual("map_end", self.transport.asked[-1][0])

    def test_a_map_that_grows_beyond_its_limits_is_not_fetched_any_further(self) -> None:
        limits = MapLimits(max_pages=1)
        beyond = limits.max_bytes // 100 + 1
        made = self.saved(beyond, chunks=beyond + 1)
        self.assertRaises(exception.BufferMapError, made.save_map, self.path, limits)
        self.assertFalse(self.path.exists())

    def test_a_map_that_is_not_wanted_any_more_is_not_fetched_any_further(self) -> None:
        made = self.saved(1)
        error = self.assertRaises(
            exception.AgentRefused, made.save_map, self.path, MapLimits(), lambda: not self.saves
        )
        self.assertEqual("not-wanted", error.kwargs["code"])
        self.assertFalse(self.path.exists())

    def test_a_map_that_the_agent_has_forgotten_is_fetched_anew_from_its_beginning(self) -> None:
        gone = exception.AgentRefused(instance="i", reason="it is not here", code="unknown-map")
        made = self.saved(3, gone, 4)
        made.save_map(self.path, MapLimits())
        self.assertEqual([0, 3, 0], [each.chunks for each in self.saves])

    def test_a_host_that_cannot_save_chunks_is_asked_for_them_one_by_one(self) -> None:
        page = np.arange(0, 40000, 2, dtype=np.uint64) * 4096
        lengths = np.full(page.size, 4096, np.uint64)
        built = BufferMap.build([VolumeExtents("v", 1 << 30, page, page[::-1], lengths)])
        chunks = list(built.to_chunks(4096))

        def chunk(map_id: str, index: int) -> dict[str, Any]:
            return {"result": {"index": index, "data": base64.b64encode(chunks[index]).decode()}}

        for code in ("version", "map-file", "map-not-allowed"):
            no = exception.AgentRefused(instance="i", reason="no", code=code)
            made = self.saved(no, chunks=len(chunks))
            self.transport.answers["map_chunk"] = chunk
            made.save_map(self.path, MapLimits())
            self.assertEqual(1, len(self.saves))
            self.assertEqual(built, BufferMap.load(self.path, MapLimits()))

    def test_an_agent_that_speaks_of_another_map_is_refused(self) -> None:
        made = self.make(map_begin=state(state="building"), map_state=state(map_id="other"))
        self.assertRaises(exception.AgentRefused, fetch_map, made)

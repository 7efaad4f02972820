# SPDX-License-Identifier: Apache-2.0
"""Requests to a host's service: records with limits, a client that believes nothing."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.rpc import client, fields, host_client, host_messages
from nova_dmigrate.rpc.host_messages import HOST
from nova_dmigrate.rpc.protocol import Refusal
from tests import base
from tests.unit.rpc.test_client import Scripted, Then
from tests.unit.rpc.test_fields import JSON

SECRET = "0123456789abcdef" * 4
STATE = {
    "session_id": "s",
    "migration_id": "m",
    "instance": "i",
    "role": "source",
    "state": "running",
    "message": "",
    "host": None,
    "port": None,
    "queue_position": 0,
    "lease_remaining": 30.0,
    "progress": "{}",
    "summary_path": "/var/lib/s.json",
}
HELLO = {
    "host": "one",
    "version": "1.0",
    "wire_versions": [1],
    "incarnation": "abc",
    "tls": True,
    "drivers": ["block"],
    "relays": 0,
    "max_relays": 4,
    "queued": 0,
    "draining": False,
    "migration_address": None,
    "socket_directory": "/run/nova-dmigrate",
}
ORDER = host_messages.OpenSource(
    "m", "i", "s", token=SECRET, qemu_socket="/run/x", host="192.0.2.1", port=4711
)
RECORDS = sorted(
    {each for method in HOST.methods.values() for each in (method.arguments, method.result)}
    | {host_messages.Volume},
    key=lambda cls: cls.__name__,
)
LOST = exception.HostUnreachable(host="one", reason="no answer in time")


def refused(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "so it is"}}


class MessagesTest(base.TestCase):
    def test_every_field_of_every_record_is_checked(self) -> None:
        for cls in RECORDS:
            for field in dataclasses.fields(cls):
                self.assertIn("check", field.metadata, f"{cls.__name__}.{field.name}")

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.sampled_from(RECORDS), JSON)
    def test_anything_is_either_a_record_or_malformed(self, cls: type[Any], value: Any) -> None:
        with contextlib.suppress(fields.Malformed):
            self.assertIsInstance(fields.parse(cls, value, strict=True), cls)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.data())
    def test_one_wrong_field_is_either_taken_or_named(self, data: st.DataObject) -> None:
        whole = fields.to_dict(ORDER)
        name = data.draw(st.sampled_from(sorted(whole)))
        try:
            fields.parse(host_messages.OpenSource, {**whole, name: data.draw(JSON)}, strict=True)
        except fields.Malformed as error:
            self.assertIn(name, str(error))

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.sampled_from(sorted(HOST.methods)), JSON, st.sampled_from(["result", "error"]))
    def test_any_answer_is_a_result_a_refusal_or_malformed(
        self, method: str, value: Any, where: str
    ) -> None:
        with contextlib.suppress(fields.Malformed):
            found = HOST.result_of(method, {where: value})
            self.assertIsInstance(found, (HOST.methods[method].result, Refusal))

    def test_orders_survive_the_way(self) -> None:
        volumes = (host_messages.Volume("v", "block", "/dev/vg/v"),)
        order = host_messages.OpenDestination("m", "i", "s", SECRET, "/run/x", volumes)
        for each in (order, ORDER):
            carried = json.loads(json.dumps(fields.to_dict(each)))
            self.assertEqual(each, fields.parse(type(each), carried, strict=True))

    def test_the_migrations_token_is_in_no_text(self) -> None:
        self.assertNotIn(SECRET, repr(ORDER))
        error = self.assertRaises(fields.Malformed, fields.secret, SECRET[1:])
        self.assertNotIn(SECRET[1:20], str(error))

    def test_secrets_are_64_digits(self) -> None:
        self.assertEqual(SECRET, fields.secret(SECRET))
        for value in (SECRET[1:], SECRET + "0", SECRET.upper(), "g" * 64, SECRET + "\n", 5, None):
            self.assertRaises(fields.Malformed, fields.secret, value)

    def test_paths_are_absolute_and_go_straight(self) -> None:
        check = fields.path(20)
        for value in ("/", "/run/x", "/run/..x", "/ä", "/a//b"):
            self.assertEqual(value, check(value))
        for value in ("", "x", "../x", "/a/../b", "/..", "/a\n", "/a\0", "/" + 20 * "a", 5, None):
            self.assertRaises(fields.Malformed, check, value)
        self.assertRaises(fields.Malformed, check, "/" + 10 * "ä")
        self.assertRaises(fields.Malformed, check, "/\udc80")


class HostClientTest(base.TestCase):
    def make(self, **answers: Any) -> host_client.HostClient:
        self.transport = Scripted(**answers)
        self.slept: list[float] = []
        return host_client.HostClient("one", self.transport, sleep=self.slept.append)

    def test_hello_is_asked_once(self) -> None:
        made = self.make(hello=Then([LOST, {"result": HELLO}]))
        self.assertRaises(exception.HostUnreachable, made.hello)
        self.assertEqual("one", made.hello().host)
        self.assertEqual([], self.slept)

    def test_an_older_host_does_not_tell_what_it_does_not_know(self) -> None:
        state = self.make(hello={"result": HELLO}).hello()
        self.assertEqual((None, None), (state.libvirt_version, state.qemu_version))
        newer = {**HELLO, "libvirt_version": 9_000_000, "qemu_version": 7_002_000}
        state = self.make(hello={"result": newer}).hello()
        self.assertEqual((9_000_000, 7_002_000), (state.libvirt_version, state.qemu_version))

    def test_a_lost_answer_is_asked_for_again(self) -> None:
        made = self.make(renew=Then([LOST, {"result": STATE}]))
        self.assertEqual("running", made.renew("s").state)
        self.assertEqual(1, len(self.slept))

    def test_a_downtime_may_not_be_known(self) -> None:
        for answer, known in (({"milliseconds": 87.5}, 87.5), ({}, None)):
            made = self.make(downtime={"result": answer})
            self.assertEqual(known, made.downtime("d"))

    def test_hello_asks_for_no_more_than_every_migration_needs(self) -> None:
        made = self.make(hello={"result": HELLO})
        self.assertEqual("1.1", made.hello().needs)
        ((_, _, arguments),) = self.transport.asked
        older = dataclasses.replace(HOST, version="1.1")
        self.assertTrue(older.speaks(arguments["version"]))
        for method, each in HOST.methods.items():
            newer = method in ("save_chunks", "downtime")
            self.assertEqual(not newer, older.speaks(each.since), method)

    def test_a_session_of_each_role_is_opened_by_its_own_method(self) -> None:
        answer = {"result": STATE}
        made = self.make(open_source=answer, open_destination=answer)
        made.open_session(ORDER)
        made.open_session(host_messages.OpenDestination("m", "i", "s", SECRET, "/run/x"))
        asked = [method for method, _, _ in self.transport.asked]
        self.assertEqual(["open_source", "open_destination"], asked)

    def test_an_answer_about_another_session_makes_no_sense(self) -> None:
        for method in ("session", "renew", "close"):
            made = self.make(**{method: {"result": {**STATE, "session_id": "t"}}})
            ask = made.close_session if method == "close" else getattr(made, method)
            error = self.assertRaises(exception.HostRefused, ask, "s")
            self.assertEqual("nonsense", error.kwargs["code"])

    def test_a_refusal_names_the_host_and_its_code(self) -> None:
        made = self.make(open_source=refused("draining"))
        error = self.assertRaises(exception.HostRefused, made.open_session, ORDER)
        self.assertEqual(("one", "draining"), (error.kwargs["host"], error.kwargs["code"]))
        self.assertIn("Host one: open_source: so it is", str(error))

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(st.sampled_from(["hello", "session", "renew", "summary"]), JSON)
    def test_no_answer_raises_anything_else(self, method: str, value: Any) -> None:
        for answer in (value, {"result": value}, {"error": value}):
            made = self.make(**{method: answer})
            with contextlib.suppress(exception.HostError):
                getattr(made, method)(*(() if method == "hello" else ("s",)))

    # Summaries

    def summary(self, data: bytes, size: int | None = None, piece: int = 30) -> Any:
        def answer(session_id: str, offset: int) -> dict[str, Any]:
            part = base64.b64encode(data[offset : offset + piece]).decode()
            whole = len(data) if size is None else size
            return {"result": {"size": whole, "offset": offset, "data": part}}

        return self.make(summary=answer).summary("s")

    def test_a_summary_comes_in_pieces(self) -> None:
        whole = {"state": "delivered", "series": [{"t": n} for n in range(100)]}
        self.assertEqual(whole, self.summary(gzip.compress(json.dumps(whole).encode())))
        self.assertGreater(len(self.transport.asked), 5)

    def test_no_summary_is_no_error(self) -> None:
        self.assertIsNone(self.make(summary=refused("no-summary")).summary("s"))
        made = self.make(summary=refused("unknown-session"))
        self.assertRaises(exception.HostRefused, made.summary, "s")

    def test_what_is_no_summary_is_refused(self) -> None:
        good = gzip.compress(b'{"a": 1}')
        for data in (b"not gzip", good[:-9], gzip.compress(b"[1]"), gzip.compress(b"{"), b""):
            self.assertRaises(exception.HostRefused, self.summary, data)
        self.assertRaises(exception.HostRefused, self.summary, good, len(good) + 1)
        self.assertRaises(exception.HostRefused, self.summary, good, 3)

    def test_a_summary_that_unpacks_without_end_is_refused(self) -> None:
        bomb = gzip.compress(bytes(host_messages.MAX_SUMMARY_BYTES + 1))
        self.assertRaises(exception.HostRefused, self.summary, bomb, None, 300000)

    # The agent through the host

    def agent(self, answer: Any) -> client.AgentClient:
        transport = host_client.HostChannelTransport("i", self.make(agent=answer), "/run/port")
        return client.AgentClient("i", transport, client.ClientSettings(5, 1))

    def test_the_agent_answers_through_the_host(self) -> None:
        pong = {"result": {"agent_version": "1", "version": "1.0", "incarnation": "abc"}}
        asked = self.agent({"result": {"answer": json.dumps(pong)}})
        self.assertEqual("abc", asked.ping().incarnation)
        ((_, _, request),) = self.transport.asked
        self.assertEqual(
            ("i", "/run/port", "ping", "{}"),
            tuple(request[name] for name in ("instance", "channel_path", "method", "arguments")),
        )

    def test_who_of_both_is_missing_the_agent_is_unreachable(self) -> None:
        for answer in (LOST, refused("agent-unreachable")):
            self.assertRaises(exception.AgentUnreachable, self.agent(answer).ping)

    def test_what_the_host_refuses_the_agent_refuses(self) -> None:
        error = self.assertRaises(exception.AgentRefused, self.agent(refused("channel")).ping)
        self.assertEqual("channel", error.kwargs["code"])

    # Chunks of a map

    def save(self, answer: Any) -> client.MapFile:
        transport = host_client.HostChannelTransport("i", self.make(save_chunks=answer), "/run/p")
        return transport.save_chunks("m", 5, client.MapFile("/maps/m", 4096, 2, 200), 7.0)

    def test_chunks_are_saved_behind_those_that_are_there(self) -> None:
        file = self.save({"result": {"chunks": 4, "size": 500}})
        self.assertEqual(client.MapFile("/maps/m", 4096, 4, 500), file)
        ((_, _, request),) = self.transport.asked
        self.assertEqual(
            (2, 5, 200), tuple(request[each] for each in ("first", "behind", "offset"))
        )
        self.assertEqual(("/maps/m", 7.0), (request["buffer_map"], request["timeout"]))
        self.assertEqual(file.max_bytes, request["max_bytes"])

    def test_a_host_that_has_saved_none_or_too_many_makes_no_sense(self) -> None:
        for chunks in (1, 2, 6):
            error = self.assertRaises(
                exception.AgentRefused, self.save, {"result": {"chunks": chunks, "size": 500}}
            )
            self.assertEqual("nonsense", error.kwargs["code"])

    def test_a_map_that_would_become_too_large_is_a_map_error(self) -> None:
        self.assertRaises(exception.BufferMapError, self.save, refused("large-map"))

    def test_a_request_without_a_limit_gets_one(self) -> None:
        order = fields.to_dict(
            host_messages.SaveChunks("i", "/run/p", "m", 0, 5, 4096, "/maps/m", 0, 7.0)
        )
        del order["max_bytes"]
        made = fields.parse(host_messages.SaveChunks, order, strict=True)
        self.assertEqual(MapLimits().max_bytes, made.max_bytes)

    def test_why_chunks_are_not_saved_is_told(self) -> None:
        self.assertRaises(exception.AgentUnreachable, self.save, LOST)
        self.assertEqual(1, len(self.transport.asked))
        for code in ("version", "unknown-map", "map-file", "map-not-allowed"):
            error = self.assertRaises(exception.AgentRefused, self.save, refused(code))
            self.assertEqual(code, error.kwargs["code"])

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(JSON | st.text())
    def test_no_answer_of_an_agent_raises_anything_else(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        with contextlib.suppress(exception.AgentRequestError):
            self.agent({"result": {"answer": text}}).ping()

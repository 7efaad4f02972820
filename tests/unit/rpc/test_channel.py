# SPDX-License-Identifier: Apache-2.0
"""Lines over a channel: what a virtio-serial port does, over socket pairs."""

import json
import os
import pty
import select
import socket
import time
import tty
from typing import Any

import fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.rpc import channel, client, lines, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from tests import base
from tests.unit.rpc.test_dispatcher import Handler


class SplitterTest(base.TestCase):
    def test_lines_are_found_whatever_the_pieces(self) -> None:
        data = b"one\ntwo\n\n\nthree\nfo"
        for size in range(1, len(data)):
            splitter = lines.Splitter()
            found = []
            for start in range(0, len(data), size):
                found += splitter.feed(data[start : start + size])
            self.assertEqual([b"one", b"two", b"three"], found)

    def test_a_line_that_is_too_long_costs_only_itself(self) -> None:
        splitter = lines.Splitter(limit=4)
        self.assertEqual([b"1234"], splitter.feed(b"1234\n12345\n"))
        self.assertEqual([], splitter.feed(b"x" * 100))
        self.assertEqual([], splitter.feed(b"y" * 100))
        self.assertEqual([b"ok"], splitter.feed(b"z\nok\n"))

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 20))
    def test_no_line_and_no_rest_is_ever_longer_than_the_limit(
        self, pieces: list[bytes], limit: int
    ) -> None:
        splitter = lines.Splitter(limit)
        for piece in pieces:
            for line in splitter.feed(piece):
                self.assertTrue(0 < len(line) <= limit)
            self.assertLessEqual(len(splitter._rest), limit)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.binary(max_size=60))
    def test_any_line_decodes_to_an_object_or_nothing(self, line: bytes) -> None:
        self.assertIsInstance(lines.decode(line), (dict, type(None)))

    def test_deep_nesting_decodes_to_nothing(self) -> None:
        self.assertIsNone(lines.decode(b"[" * 200000))


class ChannelTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova_dmigrate.rpc.channel._WAKE_INTERVAL", 0.05))
        self.ends = [socket.socketpair()]
        self.addCleanup(self.close_all)
        self.handler = Handler()
        self.server = channel.ChannelServer(
            Dispatcher(self.handler, messages.AGENT), self.open_guest
        )
        self.server.start()
        self.addCleanup(self.server.stop)
        self.transport = channel.ChannelTransport("i", lambda: os.dup(self.host.fileno()))
        self.addCleanup(self.transport.close)
        self.client = client.AgentClient("i", self.transport, client.ClientSettings(5, 1))

    @property
    def host(self) -> socket.socket:
        return self.ends[-1][0]

    def open_guest(self) -> int:
        return os.dup(self.ends[-1][1].fileno())

    def close_all(self) -> None:
        for pair in self.ends:
            for end in pair:
                end.close()

    def push(self, data: bytes) -> None:
        """All of it into the host's end, which may be in non-blocking mode."""
        rest = memoryview(data)
        while rest:
            select.select([], [self.host], [])
            rest = rest[self.host.send(rest) :]

    def ask(self, **values: Any) -> Any:
        """One raw request; the answer with its id."""
        stream = lines.LineStream(os.dup(self.host.fileno()))
        self.addCleanup(stream.close)
        stream.send(request(**values), time.monotonic() + 30)
        answer = stream.receive(time.monotonic() + 30)
        return None if answer is None else json.loads(answer)

    def test_requests_are_answered(self) -> None:
        for _ in range(3):
            self.assertEqual("abc", self.client.ping().incarnation)
        self.assertEqual("idle", self.client.restore("x").state)

    def test_garbage_costs_nothing_but_itself(self) -> None:
        for garbage in (
            b"\x00\xff" * 100,
            b'{"id": "1", "method": "ping"',
            b'\n[1,2]\n{}\n"x"\n',
            b'\n{"id": 5}\n{"id": ""}\n{"id": "' + b"x" * 65 + b'"}\n',
            b"x" * (lines.MAX_LINE_BYTES + 70000),
        ):
            self.push(garbage)
            self.assertEqual("abc", wait(self.client).incarnation)

    def test_answers_to_other_questions_are_skipped(self) -> None:
        self.ends[-1][1].sendall(b'{"id": "another", "result": 5}\nhalf a li')
        self.assertEqual("abc", self.client.ping().incarnation)

    def test_other_versions_are_refused_and_older_minor_ones_served(self) -> None:
        newer = f"1.{int(messages.VERSION.partition('.')[2]) + 1}"
        for version in ("2.0", newer, "0.9", "", None, "1", "1.x", "1.0.0", [1]):
            self.assertEqual("version", self.ask(version=version)["error"]["code"], version)
        for version in ("1.0", messages.VERSION):
            self.assertIn("result", self.ask(version=version))

    def test_a_malformed_request_is_refused_by_its_id(self) -> None:
        answer = self.ask(id="8", arguments=[])
        self.assertEqual(("8", "malformed"), (answer["id"], answer["error"]["code"]))
        self.assertEqual("unknown-method", self.ask(method="__init__")["error"]["code"])

    def test_the_agent_comes_back_when_the_other_end_does(self) -> None:
        self.client.ping()
        self.transport.close()
        old = self.ends[-1]
        self.ends.append(socket.socketpair())
        for end in old:
            end.close()
        self.assertEqual("abc", wait(self.client).incarnation)

    def test_a_silent_guest_is_unreachable(self) -> None:
        silent, other = socket.socketpair()
        self.addCleanup(other.close)
        transport = channel.ChannelTransport("i", silent.detach)
        self.addCleanup(transport.close)
        error = self.assertRaises(exception.AgentUnreachable, transport.call, "ping", "r", {}, 0.05)
        self.assertIn("no answer", str(error))

    def test_a_guest_that_takes_nothing_is_unreachable(self) -> None:
        silent, other = socket.socketpair()
        self.addCleanup(other.close)
        silent.setblocking(False)
        try:
            while True:
                silent.send(bytes(65536))
        except BlockingIOError:
            pass
        transport = channel.ChannelTransport("i", silent.detach)
        self.addCleanup(transport.close)
        error = self.assertRaises(exception.AgentUnreachable, transport.call, "ping", "r", {}, 0.05)
        self.assertIn("does not take", str(error))

    def test_a_socket_that_is_not_there_is_unreachable(self) -> None:
        path = str(self.make_directory() / "port")
        transport = channel.ChannelTransport("i", lambda: channel.open_port(path))
        self.assertRaises(exception.AgentUnreachable, transport.call, "ping", "r", {}, 1)
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(path)
        listener.listen()
        os.close(channel.open_port(path))

    def test_a_socket_that_is_not_accepted_from_keeps_nobody_waiting(self) -> None:
        path = str(self.make_directory() / "port")
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(path)
        listener.listen(1)
        queued = []
        while True:
            transport = channel.ChannelTransport("i", lambda: channel.open_port(path))
            queued.append(transport)
            self.addCleanup(transport.close)
            error = self.assertRaises(
                exception.AgentUnreachable, transport.call, "ping", "r", {}, 0.05
            )
            if "its channel failed" in str(error):
                break
        self.assertGreater(len(queued), 1)


class DeviceTest(base.TestCase):
    """The agent's end is a character device, which other hosts hold the other end of in turn.

    It is the master of a pseudo-terminal: it says so when nobody holds the other end, which can
    be taken again, and as with a port of QEMU's, what was sent is lost once the agent closes it.
    """

    def setUp(self) -> None:
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova_dmigrate.rpc.channel._WAKE_INTERVAL", 0.05))
        device, first = pty.openpty()
        self.host_path = os.ttyname(first)
        os.close(first)
        self.opened = [device]
        self.handler = Handler()
        self.server = channel.ChannelServer(
            Dispatcher(self.handler, messages.AGENT), self.open_device
        )
        self.server.start()
        self.addCleanup(self.server.stop)

    def open_device(self) -> int:
        if not self.opened:
            raise FileNotFoundError("the device is there only once")
        return self.opened.pop()

    def open_host(self) -> int:
        descriptor = os.open(self.host_path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(descriptor)
        return descriptor

    def test_each_host_that_comes_at_once_is_answered(self) -> None:
        for _ in range(20):
            transport = channel.ChannelTransport("i", self.open_host)
            # One attempt only
            asked = client.AgentClient("i", transport, client.ClientSettings(30, 1))
            self.assertEqual("abc", asked.ping().incarnation)
            asked.close()

    def test_a_host_that_goes_without_its_answer_costs_the_next_one_nothing(self) -> None:
        for number in range(5):
            hasty = lines.LineStream(self.open_host())
            hasty.send(request(id=f"hasty-{number}"), time.monotonic() + 30)
            hasty.close()
            patient = lines.LineStream(self.open_host())
            self.addCleanup(patient.close)
            patient.send(request(id=f"patient-{number}"), time.monotonic() + 30)
            answers = []
            while not answers or "hasty" in answers[-1]["id"]:
                line = patient.receive(time.monotonic() + 30)
                assert line is not None
                answers.append(json.loads(line))
            self.assertEqual(f"patient-{number}", answers[-1]["id"])
            self.assertIn("result", answers[-1])
            patient.close()


def request(**values: Any) -> dict[str, Any]:
    return {
        "id": "7",
        "version": messages.VERSION,
        "method": "ping",
        "request_id": "r",
        "arguments": {},
        **values,
    }


def wait(asked: client.AgentClient) -> messages.Pong:
    """The agent's answer, as soon as there is one."""
    while True:
        try:
            return asked.ping()
        except exception.AgentUnreachable:
            time.sleep(0.05)

# SPDX-License-Identifier: Apache-2.0

import errno
import random
import struct
import threading
from unittest import mock

from nova_dmigrate.volumes.nbd_connection import ConnectionFailed, NbdConnection, NoAnswer
from tests import base
from tests.unit.volumes.nbd_server import (
    ACK,
    DISCONNECT,
    INFO,
    READ,
    Server,
    answer,
    exported,
    greeting,
    reply,
)

SIZE = 3 << 20
CONTENT = random.Random(3).randbytes(SIZE)
#: Seconds; nothing here takes so long where nothing is to be waited for.
TIMEOUT = 20.0
SHORT = 0.2


class NbdTestCase(base.TestCase):
    def serve(self, *scripts):
        server = Server(self.make_directory() / "nbd", scripts)
        self.addCleanup(server.close)
        return server

    def connect(self, server, timeout=TIMEOUT):
        connection = NbdConnection(server.address, "volume", timeout)
        self.addCleanup(connection.close)
        return connection

    def refusal(self, script, timeout=TIMEOUT):
        """Why there is no connection to a server that does this."""
        return str(self.assertRaises(ConnectionFailed, self.connect, self.serve(script), timeout))


class NegotiationTest(NbdTestCase):
    def test_a_descriptor_that_is_not_to_be_had_is_no_connection(self):
        error = OSError(errno.EMFILE, "Too many open files")
        with mock.patch("nova_dmigrate.volumes.nbd_connection.socket.socket", side_effect=error):
            failed = self.assertRaises(ConnectionFailed, NbdConnection, "/nbd", "volume", TIMEOUT)
        self.assertEqual("Too many open files", str(failed))

    def test_export_and_size_are_agreed_on(self):
        asked = []

        def script(peer):
            peer.negotiate(exported(SIZE))
            asked.append(peer.export)
            asked.extend(peer.requests(2))

        server = self.serve(script)
        connection = self.connect(server)
        self.assertEqual(SIZE, connection.size)
        connection.close()
        server.close()
        self.assertEqual(([b"volume", (DISCONNECT, 1, 0, 0)], []), (asked, server.failures))

    def test_only_what_the_server_offers_is_agreed_on(self):
        flags = []
        for offered in (1, 3, 0xFFFF):

            def script(peer, offered=offered):
                peer.send(greeting(flags=offered))
                flags.append(struct.unpack(">I", peer.socket.recv(4))[0])

            self.refusal(script)
        self.assertEqual([1, 3, 3], flags)

    def test_what_is_no_such_server_is_refused(self):
        for hello in (
            greeting(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"),  # the old style
            greeting(b"SSH-2.0-OpenSSH_"),
            greeting(flags=0),
        ):
            self.assertIn(
                "no server of NBD", self.refusal(lambda peer, what=hello: peer.send(what))
            )

    def test_a_refusal_is_told_in_the_servers_words_or_ours(self):
        for answers, sentence in (
            (answer(0x80000006), "refuses to export: it has no such export"),
            (answer(0x80000006, b"export 'volume' not present"), ": export 'volume' not present"),
            (answer(0x80000001), "the option is not supported"),
            (answer(0x80000FFF), "error 0x80000fff"),
            (answer(ACK), "does not tell the size"),
            (answer(INFO, struct.pack(">HQ", 0, 1)), "not understood"),
            (answer(ACK, option=3), "not understood"),
            (answer(ACK, magic=1), "not understood"),
            (struct.pack(">QIII", 0x3E889045565A9, 7, INFO, 1 << 30), "not understood"),
        ):
            self.assertIn(sentence, self.refusal(lambda peer, what=answers: peer.negotiate(what)))

    def test_a_server_that_leaves_or_is_silent_or_not_there_is_an_error(self):
        self.assertIn("reset", self.refusal(lambda peer: None))
        self.assertIn("reset", self.refusal(lambda peer: peer.negotiate(exported(SIZE)[:30])))
        released = threading.Event()
        self.addCleanup(released.set)
        said = self.refusal(lambda peer: released.wait(), SHORT)
        self.assertEqual("no answer for 0.2 seconds", said)
        released.set()
        nowhere = str(self.make_directory() / "nbd")
        error = self.assertRaises(ConnectionFailed, NbdConnection, nowhere, "volume", TIMEOUT)
        self.assertIn("No such file", str(error))


class ReadTest(NbdTestCase):
    def read(self, connection, offset, length):
        """(error, data) of a range."""
        buffer = memoryview(bytearray(length))
        return connection.read(offset, buffer), bytes(buffer)

    def one(self, handle, timeout=TIMEOUT):
        """A connection to a server that gives ``handle`` each read."""

        def script(peer):
            peer.negotiate(exported(SIZE))
            while requests := peer.requests(1):
                if requests[0][0] == READ:
                    handle(peer, *requests[0][1:])

        return self.connect(self.serve(script), timeout)

    def test_long_ranges_are_read_in_parts_one_after_the_other(self):
        asked = []

        def handle(peer, cookie, offset, length):
            asked.append(length)
            peer.socket.settimeout(SHORT)
            self.assertRaises(TimeoutError, peer.socket.recv, 1)
            peer.socket.settimeout(None)
            peer.send(reply(cookie, CONTENT[offset : offset + length]))

        with mock.patch("nova_dmigrate.volumes.nbd_connection._MAX_READ", 1 << 20):
            error, data = self.read(self.one(handle), 4096, (2 << 20) + 4096)
        self.assertEqual([1 << 20, 1 << 20, 4096], asked)
        self.assertEqual((0, CONTENT[4096 : (2 << 20) + 8192]), (error, data))

    def test_data_may_come_in_small_pieces(self):
        def handle(peer, cookie, offset, length):
            data = reply(cookie, CONTENT[offset : offset + length])
            for start in range(0, len(data), 1000):
                peer.send(data[start : start + 1000])

        error, data = self.read(self.one(handle), 8192, 65536)
        self.assertEqual((0, CONTENT[8192 : 8192 + 65536]), (error, data))

    def test_a_range_that_fails_does_not_end_the_connection(self):
        def handle(peer, cookie, offset, length):
            if offset == 4096:
                peer.send(reply(cookie, error=errno.EIO))
            else:
                peer.send(reply(cookie, CONTENT[offset : offset + length]))

        connection = self.one(handle)
        self.assertEqual(errno.EIO, self.read(connection, 4096, 4096)[0])
        self.assertEqual((0, CONTENT[12288:16384]), self.read(connection, 12288, 4096))

    def test_what_is_no_answer_to_a_read_ends_the_connection(self):
        for handle in (
            lambda peer, cookie, *_: peer.send(reply(cookie, bytes(4096), magic=0x668E33EF)),
            lambda peer, cookie, *_: peer.send(reply(cookie + 1, bytes(4096))),
        ):
            error = self.assertRaises(ConnectionFailed, self.read, self.one(handle), 0, 4096)
            self.assertIn("its answer to a read is not understood", str(error))

    def test_a_server_that_leaves_or_is_silent_ends_the_connection(self):
        def leave(peer, cookie, *_):
            peer.send(reply(cookie, bytes(100)))
            peer.socket.shutdown(2)

        error = self.assertRaises(ConnectionFailed, self.read, self.one(leave), 0, 4096)
        self.assertIn("reset", str(error))
        error = self.assertRaises(NoAnswer, self.read, self.one(lambda *_: None, SHORT), 0, 4096)
        self.assertEqual("no answer for 0.2 seconds", str(error))

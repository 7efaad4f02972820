# SPDX-License-Identifier: Apache-2.0
import dataclasses
import socket
import ssl

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import FrameType, Listener, Role, TlsSettings, connect, tls
from tests.unit.relay.wire import support
from tests.unit.relay.wire.certificates import Authority


class TlsTest(support.WireTestCase):
    use_tls = True

    def _refused(self, reason: str, **changes: object) -> str:
        """Connect with changed settings of the source; return the error there.

        :param reason: part of what the destination says
        """
        listener = self.listen()
        settings = dataclasses.replace(self.source_tls, **changes)
        error = self.assertRaises(
            exception.AuthenticationError, self.connect, listener, tls=settings
        )
        self.assert_refused(listener, 1, reason)
        self.assert_right_peer_gets_in(listener)
        return str(error)

    def test_data_is_encrypted_with_tls_1_3(self) -> None:
        sender, receiver = self.pair()
        for connection in (sender, receiver):
            self.assertIsInstance(connection._sock, ssl.SSLSocket)
            self.assertEqual("TLSv1.3", connection._sock.version())

    def test_client_of_another_authority_is_refused_on_both_sides(self) -> None:
        other = Authority(self.make_directory(), "other")
        certificate, key = other.issue(support.SOURCE)
        error = self._refused(
            "its certificate is refused: unable to get local issuer certificate",
            certificate=certificate,
            key=key,
        )
        self.assertIn("does not know the authority that issued this side's certificate", error)

    def test_server_of_another_authority_is_refused_on_both_sides(self) -> None:
        other = Authority(self.make_directory(), "other")
        error = self._refused("does not know the authority", ca=str(other.certificate))
        self.assertIn("its certificate is refused: ", error)

    def test_client_of_another_name_is_refused_on_both_sides(self) -> None:
        certificate, key = self.authority.issue("third.example.org", "192.0.2.1")
        reason = f"certificate is for third.example.org, 192.0.2.1, not for {support.SOURCE}"
        error = self._refused(reason, certificate=certificate, key=key)
        self.assertIn(f"it refused this side: its {reason}", error)

    def test_server_of_another_name_is_refused_on_both_sides(self) -> None:
        error = self._refused(
            "it does not accept this side's certificate", peer_name="third.example.org"
        )
        self.assertIn("Hostname mismatch", error)
        self.assertIn("third.example.org", error)

    def test_names_may_be_addresses_and_wildcards(self) -> None:
        source = self.authority.settings("192.0.2.1", peer="*.example.org")
        destination = self.authority.settings("*.example.org", "2001:db8::1", peer="192.0.2.1")
        listener = self.listen(tls=destination)
        for name in ("anything.example.org", "2001:db8:0::1"):
            settings = dataclasses.replace(source, peer_name=name)
            self.connect(listener, tls=settings)[0].close()
            listener.accept(support.LONG)[0].close()
        self.assertEqual(0, listener.refused)

    def test_a_name_matches_as_a_browser_would_match_it(self) -> None:
        for matches, kind, pattern, name in (
            (True, "DNS", "Host.Example.org", "host.example.ORG"),
            (True, "DNS", "host.example.org", "host.example.org."),
            (True, "DNS", "*.example.org", "host.example.org"),
            (False, "DNS", "*.example.org", "example.org"),
            (False, "DNS", "*.example.org", "a.b.example.org"),
            (False, "DNS", "*", "host"),
            (False, "DNS", "*.org", "example.org"),
            (False, "DNS", "h*.example.org", "host.example.org"),
            (False, "DNS", "192.0.2.1", "192.0.2.1"),
            (True, "IP Address", "192.0.2.1", "192.0.2.1"),
            (True, "IP Address", "2001:DB8:0:0:0:0:0:1\n", "2001:db8::1"),
            (False, "IP Address", "192.0.2.2", "192.0.2.1"),
            (False, "IP Address", "<invalid>", "192.0.2.1"),
            (False, "IP Address", "192.0.2.1", "host.example.org"),
            (False, "URI", "host.example.org", "host.example.org"),
        ):
            self.assertEqual(matches, tls._matches(kind, pattern, name), (pattern, name))

    def test_client_without_certificate_is_refused(self) -> None:
        listener = self.listen()
        context = self._stranger_context()
        with self._wrap(listener, context) as sock:
            error = self.assertRaises(ssl.SSLError, sock.recv, 1)
        self.assertIn("CERTIFICATE_REQUIRED", str(error))
        self.assert_refused(listener, 1, "it showed no certificate")
        self.assert_right_peer_gets_in(listener)

    def test_client_of_tls_1_2_is_refused(self) -> None:
        listener = self.listen()
        context = self._stranger_context()
        context.load_cert_chain(self.source_tls.certificate, self.source_tls.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        error = self.assertRaises(ssl.SSLError, self._wrap, listener, context)
        self.assertIn("PROTOCOL_VERSION", str(error))
        self.assert_refused(listener, 1, "it does not offer TLS 1.3")
        self.assert_right_peer_gets_in(listener)

    def test_server_of_tls_1_2_is_refused(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.destination_tls.certificate, self.destination_tls.key)
        with socket.create_server((support.HOST, 0)) as server:

            def serve() -> None:
                sock, _ = server.accept()
                with sock, context.wrap_socket(sock, server_side=True):
                    pass

            with support.in_thread(serve) as result:
                error = self.assertRaises(
                    exception.HandshakeError,
                    connect,
                    *server.getsockname(),
                    self.credentials,
                    Role.DATA,
                    0,
                    self.source_tls,
                    support.LONG,
                )
                self.assertIsInstance(result(), ssl.SSLError)
        self.assertIn("it does not accept this side's version of TLS", str(error))

    def test_client_in_the_clear_is_told_that_tls_is_required(self) -> None:
        listener = self.listen()
        error = self.assertRaises(exception.HandshakeError, self.connect, listener, tls=None)
        self.assertIn("it refused this side: this relay is configured to require TLS", str(error))
        self.assert_refused(listener, 1, "configured to require TLS")
        self.assert_right_peer_gets_in(listener)

    def test_client_with_tls_never_goes_on_in_the_clear(self) -> None:
        listener = self.listen(tls=None)
        error = self.assertRaises(exception.HandshakeError, self.connect, listener)
        self.assertIn("it does not speak TLS", str(error))
        self.assert_refused(listener, 1, "configured without TLS")
        self.use_tls = False
        self.assert_right_peer_gets_in(listener)

    def test_nothing_is_left_unread_at_the_client(self) -> None:
        # It would turn the client's close into a reset, and take away what was sent last.
        sender, receiver = self.pair()
        data = bytes(1 << 20)
        sender.send(FrameType.VERBATIM, payload=[data])
        sender._sock.setblocking(False)
        self.assertRaises(BlockingIOError, socket.socket.recv, sender._sock, 1, socket.MSG_PEEK)
        sender.close()
        frame = receiver.receive(support.allocate)
        self.assertEqual(data, bytes(frame.payload))
        error = self.assertRaises(exception.PeerLost, receiver.receive, support.allocate)
        self.assertIn("it closed the connection", str(error))

    def test_files_that_are_of_no_use_are_configuration_errors(self) -> None:
        directory = self.make_directory()
        empty = directory / "empty.pem"
        empty.touch()
        good = self.source_tls
        _, other_key = self.authority.issue(support.SOURCE)
        for settings in (
            dataclasses.replace(good, ca=str(directory / "missing.pem")),
            dataclasses.replace(good, ca=str(empty)),
            dataclasses.replace(good, certificate=str(empty)),
            dataclasses.replace(good, key=other_key),
            dataclasses.replace(good, peer_name=""),
        ):
            for make in (tls.client_context, tls.server_context):
                error = self.assertRaises(exception.ConfigurationError, make, settings)
                self.assertIn("TLS", str(error))

    def test_encrypted_key_is_an_error_and_not_a_question_at_the_terminal(self) -> None:
        certificate, key = self.authority.issue(support.SOURCE, password="secret")
        settings = TlsSettings(self.source_tls.ca, certificate, key, support.DESTINATION)
        error = self.assertRaises(exception.ConfigurationError, tls.client_context, settings)
        self.assertIn("the key is encrypted", str(error))

    def _stranger_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.source_tls.ca)
        return context

    def _wrap(self, listener: Listener, context: ssl.SSLContext) -> ssl.SSLSocket:
        sock = support.stranger(listener)
        self.addCleanup(sock.close)
        return context.wrap_socket(sock, server_hostname=support.DESTINATION)

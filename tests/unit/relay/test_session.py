# SPDX-License-Identifier: Apache-2.0
"""Sessions: what is told is used, and whatever is wrong is named with its instance and key."""

import json
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.relay.session import (
    DestinationSession,
    SessionDefaults,
    SourceSession,
    parse_session,
)
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeSpec
from tests.base import TestCase

TOKEN = "0123456789abcdef" * 4
VOLUME = {"volume_id": "v", "driver": "block", "location": "/dev/x"}
TLS = {"ca": "ca.pem", "certificate": "cert.pem", "key": "key.pem", "peer_name": "peer"}


def description(role: str = "source", **changes: Any) -> dict[str, Any]:
    data = {
        "role": role,
        "instance": "the-instance",
        "session_id": "the-session",
        "token": TOKEN,
        "qemu_socket": "/run/qemu",
        "host": "192.0.2.1",
        "port": 4711,
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not ...}


class SessionTest(TestCase):
    def parse(
        self, defaults: SessionDefaults | None = None, **changes: Any
    ) -> SourceSession | DestinationSession:
        return parse_session(json.dumps(description(**changes)), defaults)

    def test_a_source_is_told_everything(self) -> None:
        session = self.parse(
            tls=TLS, control_socket="/run/c", summary="/s", buffer_map="/m", memory_layout="/l"
        )
        assert isinstance(session, SourceSession)
        self.assertEqual("the-instance", session.instance)
        self.assertEqual("the-session", session.credentials.session_id)
        self.assertEqual(bytes.fromhex(TOKEN), session.credentials.token)
        self.assertEqual(Path("/run/qemu"), session.qemu_socket)
        self.assertEqual(("192.0.2.1", 4711), (session.host, session.port))
        self.assertEqual(TlsSettings("ca.pem", "cert.pem", "key.pem", "peer"), session.tls)
        self.assertEqual((Path("/run/c"), Path("/s")), (session.control_socket, session.summary))
        self.assertEqual((Path("/m"), Path("/l")), (session.buffer_map, session.memory_layout))

    def test_a_destination_is_told_its_volumes(self) -> None:
        session = self.parse(role="destination", volumes=[VOLUME])
        assert isinstance(session, DestinationSession)
        self.assertEqual((VolumeSpec("v", "block", "/dev/x"),), session.volumes)

    def test_what_may_be_missing_may_be_null(self) -> None:
        for missing in (..., None):
            session = self.parse(
                tls=missing, control_socket=missing, summary=missing, buffer_map=missing,
                memory_layout=missing,
            )  # fmt: skip
            assert isinstance(session, SourceSession)
            self.assertIsNone(session.tls)
            self.assertIsNone(session.buffer_map)
            destination = self.parse(role="destination", volumes=missing)
            assert isinstance(destination, DestinationSession)
            self.assertEqual((), destination.volumes)

    def test_the_host_gives_what_a_session_leaves_to_it(self) -> None:
        defaults = SessionDefaults(
            tls=True, ca="ca", certificate="cert", key="key", listen_host="0.0.0.0",
            listen_port=99, summaries=Path("/summaries"), runtime=Path("/runtime"),
        )  # fmt: skip
        session = self.parse(
            defaults, role="destination", host=..., port=..., tls={"peer_name": "peer"}
        )
        self.assertEqual(("0.0.0.0", 99), (session.host, session.port))
        self.assertEqual(TlsSettings("ca", "cert", "key", "peer"), session.tls)
        self.assertEqual(Path("/summaries/the-session-destination.json"), session.summary)
        self.assertEqual(Path("/runtime/the-session-destination.sock"), session.control_socket)

    def test_a_session_id_stays_within_the_hosts_directories(self) -> None:
        defaults = SessionDefaults(summaries=Path("/s"), runtime=Path("/r"))
        session = self.parse(defaults, session_id="../../etc/passwd")
        assert session.summary is not None and session.control_socket is not None
        self.assertEqual((Path("/s"), Path("/r")), (
            session.summary.parent, session.control_socket.parent
        ))  # fmt: skip

    def test_a_source_must_be_told_where_to_connect(self) -> None:
        defaults = SessionDefaults(listen_host="0.0.0.0", listen_port=99)
        for key in ("host", "port"):
            error = self.assertRaises(exception.SessionError, self.parse, defaults, **{key: ...})
            self.assertIn(key, str(error))

    def test_the_clear_is_refused_where_the_host_wants_tls(self) -> None:
        defaults = SessionDefaults(tls=True)
        for role in ("source", "destination"):
            error = self.assertRaises(exception.SessionError, self.parse, defaults, role=role)
            self.assertIn("this host does not migrate in the clear", str(error))

    def test_whatever_is_wrong_is_named_with_its_instance_and_key(self) -> None:
        texts: tuple[Any, ...] = (..., "", 7, None, ["x"])
        cases: dict[str, tuple[Any, ...]] = {
            "role": (*texts, "observer"),
            "session_id": texts,
            "qemu_socket": texts,
            "host": texts,
            "token": (*texts, "xyz", TOKEN[:-2], TOKEN + "00", "g" * 64),
            "port": (..., None, "4711", True, -1, 65536, 1.5),
            "control_socket": ("", 7, ["x"]),
            "summary": ("", 7, {}),
            "tls": (True, "x", [], {}, {**TLS, "peer_name": 7}),
            "buffer_map": (7, ""),
            "memory_layout": (7, ""),
        }
        for key, values in cases.items():
            for value in values:
                with self.subTest(key=key, value=value):
                    error = self.assertRaises(exception.SessionError, self.parse, **{key: value})
                    self.assertIn("the-instance", str(error))
                    expected = "peer_name" if isinstance(value, dict) and len(value) > 1 else key
                    if key == "tls" and value == {}:
                        expected = "tls: ca"
                    self.assertIn(expected, str(error))

    def test_a_volume_may_come_with_a_secret(self) -> None:
        session = self.parse(role="destination", volumes=[{**VOLUME, "secret": "key"}])
        assert isinstance(session, DestinationSession)
        self.assertEqual((VolumeSpec("v", "block", "/dev/x", "key"),), session.volumes)

    def test_wrong_volumes_are_named(self) -> None:
        for volumes, named in (
            ("x", "volumes"),
            ({}, "volumes"),
            ([7], "volumes[0]"),
            ([VOLUME, {**VOLUME, "driver": ""}], "volumes[1]: driver"),
            ([{"volume_id": "v"}], "volumes[0]: driver"),
            ([{**VOLUME, "color": "red"}], "volumes[0]: unknown key 'color'"),
        ):
            error = self.assertRaises(
                exception.SessionError, self.parse, role="destination", volumes=volumes
            )
            self.assertIn(named, str(error))
            self.assertIn("the-instance", str(error))

    def test_keys_that_are_not_known_are_refused(self) -> None:
        for changes, named in (
            ({"color": "red"}, "'color'"),
            ({"volumes": [VOLUME]}, "'volumes'"),
            ({"role": "destination", "buffer_map": "/m"}, "'buffer_map'"),
            ({"tls": {**TLS, "cipher": "none"}}, "tls: unknown key 'cipher'"),
        ):
            error = self.assertRaises(exception.SessionError, self.parse, **changes)
            self.assertIn(named, str(error))

    def test_a_map_without_its_layout_is_of_no_use(self) -> None:
        for key in ("buffer_map", "memory_layout"):
            error = self.assertRaises(exception.SessionError, self.parse, **{key: "/x"})
            self.assertIn("go together", str(error))

    def test_a_missing_or_wrong_instance_is_an_error(self) -> None:
        for value in (..., "", 7, None, ["x"]):
            error = self.assertRaises(exception.SessionError, self.parse, instance=value)
            self.assertIn("instance", str(error))

    def test_what_is_no_json_object_is_refused(self) -> None:
        for text in ("", "{", "[]", "7", "null", '"x"', "[" * 100_000):
            self.assertRaises(exception.SessionError, parse_session, text)

    def test_the_token_is_in_no_message(self) -> None:
        for changes in ({"port": "x"}, {"token": TOKEN + "ff"}, {"color": 1}):
            error = self.assertRaises(exception.SessionError, self.parse, **changes)
            self.assertNotIn(TOKEN, str(error))
        self.assertNotIn(TOKEN, repr(self.parse()))
        self.assertNotIn("\\x01#Eg", repr(self.parse()))

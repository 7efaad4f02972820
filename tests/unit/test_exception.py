# SPDX-License-Identifier: Apache-2.0
"""The exception hierarchy: messages, keywords, families."""

import copy
import inspect
import pickle

from nova_dmigrate import exception
from tests import base


def all_errors() -> list[type[exception.DMigrateError]]:
    return [
        member
        for _, member in inspect.getmembers(exception, inspect.isclass)
        if issubclass(member, exception.DMigrateError)
    ]


class MessageTest(base.TestCase):
    def test_the_keywords_become_part_of_the_sentence(self) -> None:
        error = exception.VolumeReadError(volume="vol-1", reason="input/output error")
        self.assertEqual("Volume vol-1: input/output error", str(error))

    def test_the_keywords_stay_readable(self) -> None:
        error = exception.PeerLost(peer="192.0.2.7:4000", reason="silent for 30 s")
        self.assertEqual({"peer": "192.0.2.7:4000", "reason": "silent for 30 s"}, error.kwargs)

    def test_a_whole_message_replaces_the_sentence(self) -> None:
        error = exception.StreamError("It ended within a record", offset=7)
        self.assertEqual("It ended within a record", str(error))
        self.assertEqual({"offset": 7}, error.kwargs)

    def test_a_missing_keyword_does_not_hide_the_others(self) -> None:
        error = exception.VolumeError(reason="gone")
        self.assertIn("reason='gone'", str(error))

    def test_a_percent_sign_in_a_reason_is_kept_as_it_is(self) -> None:
        error = exception.BufferMapError(reason="100 %s of it")
        self.assertEqual("Buffer map: 100 %s of it", str(error))

    def test_every_sentence_takes_the_keywords_of_its_family(self) -> None:
        words = {
            "reason": "why",
            "instance": "i-1",
            "volume": "vol-1",
            "peer": "there",
            "host": "compute-1",
            "server": "mariadbd",
            "path": "/var/lib/mysql",
        }
        for error_type in all_errors():
            message = str(error_type(**words))
            self.assertNotIn("%(", message, error_type.__name__)
            if error_type is not exception.DMigrateError:
                self.assertIn("why", message, error_type.__name__)

    def test_an_error_survives_pickling_and_copying_with_its_keywords(self) -> None:
        error = exception.FrameError(peer="there", reason="too long")
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            self.assertIs(exception.FrameError, type(twin))
            self.assertEqual(str(error), str(twin))
            self.assertEqual(error.kwargs, twin.kwargs)


class HierarchyTest(base.TestCase):
    def test_every_public_exception_has_the_one_base(self) -> None:
        strays = [
            name
            for name, member in inspect.getmembers(exception, inspect.isclass)
            if issubclass(member, Exception) and not issubclass(member, exception.DMigrateError)
        ]
        self.assertEqual([], strays)

    def test_each_family_can_be_caught_by_its_head(self) -> None:
        families = {
            exception.ConfigurationError: [exception.SessionError],
            exception.VolumeError: [
                exception.VolumeOpenError,
                exception.VolumeReadError,
                exception.VolumeBoundsError,
            ],
            exception.HandshakeError: [
                exception.AuthenticationError,
                exception.VersionMismatch,
            ],
            exception.WireError: [
                exception.HandshakeError,
                exception.FrameError,
                exception.PeerLost,
            ],
            exception.RelayError: [
                exception.QemuError,
                exception.MigrationCancelled,
                exception.UnsupportedStream,
            ],
        }
        for head, members in families.items():
            for member in members:
                self.assertTrue(issubclass(member, head), member.__name__)

    def test_every_exception_says_what_it_means(self) -> None:
        undocumented = [error.__name__ for error in all_errors() if not error.__doc__]
        self.assertEqual([], undocumented)

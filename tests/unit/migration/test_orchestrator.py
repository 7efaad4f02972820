# SPDX-License-Identifier: Apache-2.0
"""What keeps a migration from the relays does not keep it from being begun.

The hypervisor is libvirt's own for tests, which migrates nothing: that it says so is the sign that
it was asked.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import fixtures
from oslo_config import cfg

from nova_dmigrate import conf, exception
from nova_dmigrate.migration.request import MigrationRequest, Mode
from nova_dmigrate.migration.summary import MigrationSummary
from tests import base
from tests.unit.migration.hypervisor import (
    NAME,
    PORT,
    Host,
    Reached,
    disk,
    host_state,
    hypervisor,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.migration import service
    from nova_dmigrate.rpc import broker


class OrdinaryTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.config = cfg.ConfigOpts()
        conf.register_opts(self.config)
        broker.set_defaults(self.config)
        self.config([], project="nova-dmigrate", default_config_files=[])
        directory = str(self.make_directory())
        self.config.set_override("history_directory", directory, "migration")
        self.config.set_override("state_directory", directory, "host")

    def migrate(self, **request: Any) -> MigrationSummary:
        uri = hypervisor(self.make_directory(), PORT, disk("vda"))
        return service.migrate(
            MigrationRequest(NAME, "qemu+tls://b/system", uri, source_host="a", **request),
            self.config,
        )

    def assert_ordinary(self, code: str, summary: MigrationSummary) -> None:
        self.assertEqual(("ordinary", code), (summary.mode, summary.fallback_reason), summary)
        self.assertEqual("failed", summary.state)
        self.assertIn("not supported", str(summary.error))

    def test_a_broker_that_cannot_be_is_a_reason(self) -> None:
        for url in ("pigeon://b/", "rabbit://b:port/", "rabbit//b"):
            self.config.set_override("transport_url", url)
            summary = self.migrate()
            self.assert_ordinary("configuration", summary)
            self.assertIn("transport URL", str(summary.fallback_message))

    def test_the_ordinary_migration_needs_no_broker(self) -> None:
        self.config.set_override("transport_url", "pigeon://b/")
        self.assert_ordinary("asked", self.migrate(mode=Mode.ORDINARY))

    def test_where_relays_are_required_it_is_refused(self) -> None:
        self.config.set_override("transport_url", "pigeon://b/")
        error = self.assertRaises(exception.FallBack, self.migrate, mode=Mode.REQUIRED)
        self.assertEqual("configuration", error.kwargs["code"])

    def test_an_error_that_nobody_expected_is_a_reason_and_is_logged(self) -> None:
        @contextlib.contextmanager
        def broken(*arguments: Any) -> Iterator[None]:
            raise ZeroDivisionError("oops")
            yield

        self.useFixture(fixtures.MonkeyPatch("nova_dmigrate.migration.service.open_peers", broken))
        summary = self.migrate()
        self.assert_ordinary("unexpected", summary)
        self.assertIn("ZeroDivisionError: oops", str(summary.fallback_message))
        self.assertIn("Traceback", self.log.output)

    def test_hosts_that_do_not_answer_are_a_reason(self) -> None:
        self.useFixture(Reached({"a": Host(host_state("a"))}))
        summary = self.migrate()
        self.assert_ordinary("host-unreachable", summary)
        self.assertIn("Host b: no answer in time", str(summary.fallback_message))

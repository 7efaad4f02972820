# SPDX-License-Identifier: Apache-2.0
"""The host service's entry point: settings, and what is wrong from the beginning."""

import contextlib
import grp
import io
import pwd
import sys
from unittest import mock

from oslo_config import cfg

from nova_dmigrate import conf, exception
from nova_dmigrate.cmd import host
from nova_dmigrate.host.capacity import Load, Rates
from tests.base import TestCase

MIB = 1 << 20


class SettingsTest(TestCase):
    def make(self, **options: object) -> cfg.ConfigOpts:
        """:param options: "group__name"."""
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config([], project="nova-dmigrate", default_config_files=[], default_config_dirs=[])
        for name, value in options.items():
            group, _, option = name.partition("__")
            config.set_override(option, value, group=group)
        return config

    def test_limits_are_in_bytes(self) -> None:
        limits = host.limits_from(
            self.make(
                host__memory_limit=1024,
                host__network_bandwidth=10,
                volume__bandwidth=0.5,
                relay__window_size=100,
                relay__read_ahead=50,
            )
        )
        self.assertEqual(1024 * MIB, limits.memory)
        # With a relay's program
        self.assertEqual({"source": 228 * MIB, "destination": 228 * MIB}, limits.relay_memory)
        self.assertEqual(228 * MIB + (40 << 20), limits.needs(Load("source", 4 << 30)))
        self.assertEqual((Rates(10 * MIB, 0), Rates(0, MIB / 2)), (limits.host, limits.relay))

    def test_memory_must_do_for_one_migration(self) -> None:
        # A window of 256 MiB, twice 64 MiB, and twice the program
        host.limits_from(self.make(host__memory_limit=640))
        error = self.assertRaises(
            exception.ConfigurationError, host.limits_from, self.make(host__memory_limit=639)
        )
        self.assertIn("memory_limit", str(error))

    def test_what_encrypted_and_remote_volumes_need_is_offered_only_where_it_is_allowed(
        self,
    ) -> None:
        for options, offered in (
            ({}, set()),
            ({"host__volume_keys": True}, {"luks"}),
            ({"host__volume_keys": True, "host__libvirt_uri": ""}, set()),
            ({"host__iscsi_units": ["iscsi://10.0.0.5:3260/iqn.x:*/1"]}, {"iscsi"}),
        ):
            settings = host.service_settings_from(self.make(**options), "one", (5, 6))
            self.assertEqual({"block", "nbd", "rbd"} | offered, settings.drivers)

    def test_the_address_is_told_if_it_is_one(self) -> None:
        for address, told in (("0.0.0.0", None), ("::", None), ("192.0.2.1", "192.0.2.1")):
            settings = host.service_settings_from(
                self.make(wire__listen_address=address), "one", (5, 6)
            )
            self.assertEqual(told, settings.migration_address)

    def test_qemus_user_and_group_are_looked_up(self) -> None:
        user, group = pwd.getpwnam("nobody"), grp.getgrgid(pwd.getpwnam("nobody").pw_gid)
        config = self.make(host__qemu_user="nobody", host__qemu_group=group.gr_name)
        settings = host.session_settings_from(config, "one")
        self.assertEqual((user.pw_uid, group.gr_gid), settings.owner)
        self.assertRaises(
            exception.ConfigurationError,
            host.session_settings_from,
            self.make(host__qemu_user="no such user"),
            "one",
        )

    def test_relays_have_the_same_configuration(self) -> None:
        path = self.make_directory() / "x.conf"
        path.write_text("")
        config = cfg.ConfigOpts()
        config(["--config-file", str(path)], project="nova-dmigrate")
        command = host.relay_command(config)
        self.assertEqual(sys.executable, command[0])
        self.assertEqual(["--config-file", str(path)], command[3:])


class MainTest(TestCase):
    def test_a_wrong_configuration_is_told(self) -> None:
        path = self.make_directory() / "x.conf"
        path.write_text("[host]\nmax_relays = 0\n")
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), mock.patch.object(host.log, "setup"):
            self.assertEqual(2, host.main(["--config-file", str(path)]))
        self.assertIn("max_relays", errors.getvalue())

    def test_metrics_without_their_package_are_a_wrong_configuration(self) -> None:
        here = self.make_directory()
        path = here / "x.conf"
        path.write_text(
            f"[host]\nmetrics_port = 1\nstate_directory = {here}/state\n"
            f"socket_directory = {here}/run\n"
        )
        errors = io.StringIO()
        missing = {"prometheus_client": None, "nova_dmigrate.host.metrics": None}
        with (
            contextlib.redirect_stderr(errors),
            mock.patch.object(host.log, "setup"),
            mock.patch.dict(sys.modules, missing),
        ):
            self.assertEqual(2, host.main(["--config-file", str(path)]))
        self.assertIn("[host]metrics_port", errors.getvalue())

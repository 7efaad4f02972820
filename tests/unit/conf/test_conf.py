# SPDX-License-Identifier: Apache-2.0
"""The options: registration, limits, help texts, and the sample file made from them."""

import contextlib
import io
import sys
import unittest
from pathlib import Path

from oslo_config import cfg, generator

from nova_dmigrate import conf
from nova_dmigrate.conf import opts
from tests import base

NUMBERS = (cfg.IntOpt, cfg.FloatOpt)
SAMPLES = Path(__file__).parents[3] / "etc" / "nova-dmigrate"


def make_conf() -> cfg.ConfigOpts:
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    config([], project="nova-dmigrate", default_config_files=[], default_config_dirs=[])
    return config


def every_option() -> list[tuple[str, cfg.Opt]]:
    return [
        (f"[{module.GROUP.name}]{option.name}", option)
        for module in conf.GROUPS
        for option in module.OPTIONS
    ]


class RegistrationTest(base.TestCase):
    def test_every_option_can_be_read_and_has_its_default(self) -> None:
        config = make_conf()
        for module in conf.GROUPS:
            for option in module.OPTIONS:
                value = getattr(getattr(config, module.GROUP.name), option.dest)
                self.assertEqual(option.default, value, option.name)

    def test_registering_twice_is_harmless(self) -> None:
        config = make_conf()
        conf.register_opts(config)
        self.assertEqual(256, config.relay.window_size)

    def test_two_configurations_do_not_share_values(self) -> None:
        one, other = make_conf(), make_conf()
        one.set_override("window_size", 1024, group="relay")
        self.assertEqual(256, other.relay.window_size)

    def test_a_file_sets_values(self) -> None:
        path = self.make_directory() / "relay.conf"
        path.write_text("[volume]\nbandwidth = 47.5\n[wire]\nlisten_address = fd00::7\n")
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config([], default_config_files=[str(path)])
        self.assertEqual(47.5, config.volume.bandwidth)
        self.assertEqual("fd00::7", config.wire.listen_address)


class OptionTest(base.TestCase):
    def test_every_option_explains_itself(self) -> None:
        silent = [name for name, option in every_option() if not (option.help or "").strip()]
        self.assertEqual([], silent)

    def test_every_number_has_a_minimum_and_a_maximum_and_its_default_lies_between(self) -> None:
        for name, option in every_option():
            if isinstance(option, NUMBERS):
                low, high = option.type.min, option.type.max
                self.assertIsNotNone(low, name)
                self.assertIsNotNone(high, name)
                self.assertTrue(low <= option.default <= high, name)

    def test_a_number_beyond_its_limits_is_refused(self) -> None:
        config = make_conf()
        for module in conf.GROUPS:
            for option in module.OPTIONS:
                if not isinstance(option, NUMBERS):
                    continue
                for beyond in (option.type.min - 1, option.type.max + 1):
                    self.assertRaises(
                        ValueError,
                        config.set_override,
                        option.name,
                        beyond,
                        group=module.GROUP.name,
                    )

    def test_no_option_has_a_dash_or_a_capital_in_its_name(self) -> None:
        odd = [name for name, option in every_option() if option.name != option.dest.lower()]
        self.assertEqual([], odd)


class SampleTest(base.TestCase):
    def test_the_generator_finds_every_group_once(self) -> None:
        groups = [group.name for group, _ in opts.list_opts()]
        self.assertEqual(
            ["relay", "volume", "wire", "buffer_map", "host", "agent", "migration"], groups
        )

    @unittest.skipIf(sys.version_info < (3, 10), "the generator cannot find its own version there")
    def test_the_sample_file_is_what_the_options_give(self) -> None:
        made = self.make_directory() / "made.conf"
        settings = str(SAMPLES / "nova-dmigrate-config-generator.conf")
        with contextlib.redirect_stdout(io.StringIO()):
            generator.main(["--config-file", settings, "--output-file", str(made)])
        kept = SAMPLES / "nova-dmigrate.conf.sample"
        self.assertEqual(made.read_text(), kept.read_text(), "Run 'make sample' and commit it")

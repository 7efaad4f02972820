# SPDX-License-Identifier: Apache-2.0
"""The two configurations that nova-compute has with our driver."""

import contextlib
import io
import sys
import unittest
from pathlib import Path

from oslo_config import cfg, generator

from nova_dmigrate import exception
from nova_dmigrate.conf import nova as options
from nova_dmigrate.virt import configuration
from tests import base

SAMPLES = Path(__file__).parents[3] / "etc" / "nova-dmigrate"


def nova_conf(*files: Path) -> cfg.ConfigOpts:
    """What stands for Nova's configuration: an option "host", a URL, and ours."""
    config = cfg.ConfigOpts()
    config.register_opts([cfg.StrOpt("host", default="compute1"), cfg.StrOpt("transport_url")])
    configuration.register(config)
    config([], default_config_files=[], default_config_dirs=[])
    config.set_override("transport_url", "fake://nova/")
    if files:
        config.set_override("config_file", [str(file) for file in files], group="dmigrate")
    return config


class ConfigurationTest(base.TestCase):
    def test_novas_own_options_stay_what_they_are(self):
        config = nova_conf()
        configuration.load(config)
        self.assertEqual("compute1", config.host)
        self.assertEqual("disabled", config.dmigrate.default_policy)

    def test_what_our_files_say_counts(self):
        file = self.make_directory() / "own.conf"
        file.write_text("[DEFAULT]\ntransport_url = fake://own/\n[migration]\nlease = 17\n")
        own = configuration.load(nova_conf(file))
        self.assertEqual(17, own.migration.lease)
        self.assertEqual("fake://own/", own.transport_url)

    def test_so_do_files_in_the_directory_beside_one(self):
        file = self.make_directory() / "own.conf"
        file.write_text("[migration]\nlease = 17\nmap_time = 18\n")
        directory = file.with_name("own.conf.d")
        directory.mkdir()
        (directory / "more.conf").write_text("[migration]\nmap_time = 19\n")
        own = configuration.load(nova_conf(file))
        self.assertEqual((17, 19), (own.migration.lease, own.migration.map_time))
        # The host service reads it, too, where there is no such file
        file.unlink()
        self.patch_default(file)
        self.assertEqual(19, configuration.load(nova_conf(file)).migration.map_time)

    def test_without_a_broker_of_our_own_it_is_novas(self):
        file = self.make_directory() / "own.conf"
        for text in ("", "[DEFAULT]\ntransport_url =\n"):
            file.write_text(text)
            self.assertEqual("fake://nova/", configuration.load(nova_conf(file)).transport_url)

    def test_the_usual_file_may_be_missing_another_may_not(self):
        missing = self.make_directory() / "missing.conf"
        self.patch_default(missing)
        self.assertEqual(30, configuration.load(nova_conf(missing)).migration.lease)
        other = missing.with_name("other.conf")
        error = self.assertRaises(
            exception.ConfigurationError, configuration.load, nova_conf(missing, other)
        )
        self.assertIn(str(other), str(error))

    def test_a_value_that_cannot_be_is_told(self):
        file = self.make_directory() / "own.conf"
        file.write_text("[migration]\nlease = soon\n")
        error = self.assertRaises(exception.ConfigurationError, configuration.load, nova_conf(file))
        self.assertIn("lease", str(error))

    def patch_default(self, path: Path) -> None:
        before = options.DEFAULT_FILE
        self.addCleanup(setattr, options, "DEFAULT_FILE", before)
        options.DEFAULT_FILE = str(path)


class OptionTest(base.TestCase):
    def test_every_option_explains_itself(self):
        self.assertEqual([], [each.name for each in options.OPTIONS if not each.help.strip()])

    @unittest.skipIf(sys.version_info < (3, 10), "the generator cannot find its own version there")
    def test_the_sample_file_is_what_the_options_give(self):
        made = self.make_directory() / "made.conf"
        settings = str(SAMPLES / "nova-config-generator.conf")
        with contextlib.redirect_stdout(io.StringIO()):
            generator.main(["--config-file", settings, "--output-file", str(made)])
        kept = SAMPLES / "nova.conf.sample"
        self.assertEqual(made.read_text(), kept.read_text(), "Run 'make sample' and commit it")

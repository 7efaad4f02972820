# SPDX-License-Identifier: Apache-2.0
"""oslo.config reads what the plugin writes as it is meant."""

from pathlib import Path

from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.cmd import host as command
from nova_dmigrate.conf import host, nova
from tests import base
from tests.unit.devstack.node import ALL_IN_ONE, Node

#: Of Nova's own, what the plugin sets.
_NOVAS = (
    cfg.StrOpt("compute_driver"),
    cfg.StrOpt("live_migration_inbound_addr"),
    cfg.ListOpt("disk_cachemodes", default=[]),
)


class ConfigurationTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.node = Node(self.make_directory(), f"{ALL_IN_ONE},tls-proxy")

    def own(self) -> cfg.ConfigOpts:
        """nova-dmigrate.conf, every option of which has been read."""
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config.register_opt(cfg.StrOpt("transport_url"))
        config([], default_config_files=[self.node.path("etc/nova-dmigrate/nova-dmigrate.conf")])
        for module in conf.GROUPS:
            for option in module.OPTIONS:
                getattr(config[module.GROUP.name], option.dest)
        return config

    def novas(self) -> cfg.ConfigOpts:
        config = cfg.ConfigOpts()
        config.register_group(nova.GROUP)
        config.register_opts(nova.OPTIONS, group=nova.GROUP.name)
        config.register_opt(_NOVAS[0])
        config.register_opts(_NOVAS[1:], group="libvirt")
        config([], default_config_files=[self.node.path("etc/nova/nova.conf")])
        return config

    def test_nova_loads_the_driver_with_the_configuration_that_is_there(self) -> None:
        self.node.variables["NOVA_DMIGRATE_POLICY_FROM_METADATA"] = "True"
        self.node.stack()
        config = self.novas()
        self.assertEqual("dmigrate.DMigrateDriver", config.compute_driver)
        self.assertEqual("disabled", config.dmigrate.default_policy)
        self.assertTrue(config.dmigrate.policy_from_metadata)
        self.assertTrue(all(Path(path).is_file() for path in config.dmigrate.config_file))

    def test_every_policy_is_one_of_the_option(self) -> None:
        for policy in ("disabled", "preferred", "required"):
            self.node.variables["NOVA_DMIGRATE_POLICY"] = policy
            self.node.stack()
            self.assertEqual(policy, self.novas().dmigrate.default_policy)

    def test_what_nova_itself_is_told(self) -> None:
        self.node.variables |= {
            "NOVA_DMIGRATE_ADDRESS": "198.51.100.11",
            "NOVA_DMIGRATE_CEPH": "True",
        }
        self.node.stack()
        config = self.novas()
        self.assertEqual("198.51.100.11", config.libvirt.live_migration_inbound_addr)
        self.assertEqual(["network=none"], config.libvirt.disk_cachemodes)

    def test_the_plugin_sets_no_option_that_is_unknown(self) -> None:
        self.node.stack()
        known = {
            (module.GROUP.name, option.dest) for module in conf.GROUPS for option in module.OPTIONS
        } | {("DEFAULT", "debug"), ("DEFAULT", "transport_url")}
        own = self.node.path("etc/nova-dmigrate/nova-dmigrate.conf")
        said = {(call[1], call[2]) for call in self.node.called("iniset") if call[0] == own}
        self.assertEqual(set(), said - known)

    def test_the_hosts_and_the_agents_have_their_virtual_hosts(self) -> None:
        self.node.stack()
        config = self.own()
        broker = "rabbit://nova-dmigrate:secretrabbit@192.0.2.10:5672/"
        self.assertEqual(f"{broker}nova-dmigrate", config.transport_url)
        self.assertEqual(broker, config.migration.agent_url)
        self.assertEqual("broker", config.migration.agent_transport)

    def test_maps_of_small_servers_are_used(self) -> None:
        self.node.stack()
        self.assertEqual(0, self.own().migration.min_mapped_share)

    def test_the_service_has_what_it_needs(self) -> None:
        self.node.stack()
        config = self.own()
        settings = command.service_settings_from(config, "node", (0, 0))
        self.assertEqual("192.0.2.11", settings.migration_address)
        self.assertTrue(settings.tls)
        for path in (config.wire.ca_file, config.wire.certificate_file, config.wire.key_file):
            self.assertTrue(Path(path).is_file(), path)
        # Where nova-compute writes maps is where relays may read them
        self.assertEqual((self.node.path("data/nova-dmigrate/maps"),), settings.map_directories)
        defaults = {option.name: option.default for option in host.OPTIONS}["volume_directories"]
        self.assertEqual(
            {*(each for each in defaults if each.startswith("/dev")), self.node.path("data/nova")},
            set(settings.volume_directories),
        )

    def test_relays_read_the_volumes_of_cinders_pool(self) -> None:
        self.node.variables |= {"NOVA_DMIGRATE_CEPH": "True", "CINDER_CEPH_POOL": "cinder"}
        self.node.stack()
        self.assertEqual(["cinder/volume-*"], self.own().host.rbd_images)

    def test_guest_memory_is_in_the_clear_only_where_devstack_has_no_tls(self) -> None:
        self.node.variables["ENABLED_SERVICES"] = ALL_IN_ONE
        self.node.stack()
        self.assertFalse(self.own().wire.tls)

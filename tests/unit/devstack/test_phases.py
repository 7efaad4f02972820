# SPDX-License-Identifier: Apache-2.0
"""What the plugin does in each of devstack's phases, on nodes of several kinds."""

import os
import socket
from pathlib import Path

from nova_dmigrate.rpc import isolation
from tests import base
from tests.unit.devstack.node import ALL_IN_ONE, COMPUTE, ROOT, STACK, Call, Node

#: What changes something at this node or another one.
_CHANGES = ("setup_develop", "install_package", "pip_install", "run_process", "openstack", "sudo")


class PhasesTestCase(base.TestCase):
    services = ALL_IN_ONE

    def setUp(self) -> None:
        super().setUp()
        self.node = Node(self.make_directory(), self.services)

    def run_phase(self, phase: str) -> list[Call]:
        """The calls of one phase alone, without those of the settings."""
        settings = self.node.run()
        return self.node.run(phase)[len(settings) :]

    def changes(self, phase: str) -> set[str]:
        return {call[0] for call in self.run_phase(phase)} & {*_CHANGES, "iniset"}


class AllInOneTest(PhasesTestCase):
    def test_a_host_service_is_enabled_where_nova_compute_is(self) -> None:
        self.assertEqual(
            [("define_plugin", "nova-dmigrate"), ("enable_service", "dmigrate-host")],
            self.node.run(),
        )

    def test_the_name_of_the_service_does_not_switch_nova_off(self) -> None:
        # devstack: [[ ,${DISABLED_SERVICES} =~ ,"nova" ]] means that there is no Nova
        for service in self.node.run()[1][1:]:
            self.assertFalse(service.startswith(("nova", "n-", "q-", "c-", "g-", "s-", "tr-")))

    def test_nothing_is_installed_before_its_phase(self) -> None:
        self.assertEqual(set(), self.changes("stack pre-install"))

    def test_the_package_is_installed_as_nova_is(self) -> None:
        self.assertEqual([("setup_develop", str(ROOT), "host")], self.run_phase("stack install"))

    def test_nova_finds_the_driver_where_it_looks(self) -> None:
        self.node.run("stack install")
        driver = Path(self.node.path("nova/nova/virt/dmigrate"))
        self.assertEqual(ROOT / "nova/virt/dmigrate", driver.resolve())
        self.assertIn("DMigrateDriver", (driver / "__init__.py").read_text())

    def test_the_host_services_get_their_virtual_host(self) -> None:
        self.node.run("stack post-config")
        add_vhost, permissions = isolation.service_commands("nova-dmigrate")
        self.assertEqual(
            [
                ("add_user", "nova-dmigrate", "password:secretrabbit"),
                tuple(add_vhost),
                tuple(permissions),
            ],
            self.node.broker_calls(),
        )

    def test_passwords_are_no_arguments(self) -> None:
        self.node.stack()
        for call in self.node.calls:
            if call[0] != "iniset":
                self.assertNotIn("secretrabbit", " ".join(call))

    def test_novas_configuration_is_left_alone_until_neutron_has_done(self) -> None:
        calls = self.run_phase("stack post-config")
        nova_conf = self.node.path("etc/nova/nova.conf")
        waited = calls.index(("async_wait", "configure_neutron_nova"))
        self.assertEqual(
            [
                ("iniset", nova_conf, "DEFAULT", "compute_driver", "dmigrate.DMigrateDriver"),
                ("iniset", nova_conf, "dmigrate", "default_policy", "disabled"),
                ("iniset", nova_conf, "dmigrate", "policy_from_metadata", "False"),
                (
                    "iniset",
                    nova_conf,
                    "dmigrate",
                    "config_file",
                    self.node.path("etc/nova-dmigrate/nova-dmigrate.conf"),
                ),
            ],
            calls[waited + 1 :],
        )
        self.assertNotIn(nova_conf, [call[1] for call in calls[:waited] if call[0] == "iniset"])

    def test_nova_may_write_maps_and_nobody_else_read_them(self) -> None:
        self.node.run("stack post-config")
        for name in ("", "maps", "history"):
            directory = Path(self.node.path("data/nova-dmigrate")) / name
            self.assertEqual(0o700, directory.stat().st_mode & 0o777)
            self.assertEqual(os.geteuid(), directory.stat().st_uid)

    def test_the_service_runs_as_root_with_the_configuration_that_was_written(self) -> None:
        calls = self.run_phase("stack extra")
        command = f"{self.node.variables['PYTHON_PREFIX']}/nova-dmigrate-host --config-file"
        configuration = self.node.path("etc/nova-dmigrate/nova-dmigrate.conf")
        self.assertEqual(
            ("run_process", "dmigrate-host", f"{command} {configuration}", "", "root"), calls[0]
        )
        program = Path(self.node.variables["PYTHON_PREFIX"]) / "nova-dmigrate-host"
        self.assertTrue(program.exists(), "the package has no such program")

    def test_a_flavor_has_the_policy(self) -> None:
        self.node.run("stack extra")
        cloud = ("--os-cloud", "devstack-admin", "flavor")
        self.assertEqual(
            [
                (*cloud, "show", "dmigrate.preferred"),
                (
                    *(*cloud, "create", "--ram", "2048", "--vcpus", "2", "--disk", "10"),
                    "dmigrate.preferred",
                ),
                (*cloud, "set", "--property", "dmigrate:policy=preferred", "dmigrate.preferred"),
            ],
            self.node.called("openstack"),
        )

    def test_no_flavor_is_made_where_none_is_wanted(self) -> None:
        self.node.variables["NOVA_DMIGRATE_FLAVOR"] = ""
        self.node.run("stack extra")
        self.assertEqual([], self.node.called("openstack"))

    def test_tempest_is_told_what_it_may_test(self) -> None:
        calls = self.run_phase("stack test-config")
        tempest_conf = self.node.path("etc/tempest.conf")
        self.assertEqual(
            [
                ("iniset", tempest_conf, "compute-feature-enabled", name, "True")
                for name in (
                    "live_migration",
                    "volume_backed_live_migration",
                    "live_migrate_back_and_forth",
                )
            ],
            calls,
        )

    def test_ordinary_migrations_take_the_network_that_was_named(self) -> None:
        self.node.variables["NOVA_DMIGRATE_ADDRESS"] = "198.51.100.11"
        nova_conf = self.node.path("etc/nova/nova.conf")
        self.assertIn(
            ("iniset", nova_conf, "libvirt", "live_migration_inbound_addr", "198.51.100.11"),
            self.run_phase("stack post-config"),
        )

    def test_another_hypervisor_ends_devstack_early(self) -> None:
        self.node.variables["VIRT_DRIVER"] = "ironic"
        done = self.node.attempt("stack pre-install")
        self.assertNotEqual(0, done.returncode)
        self.assertIn("VIRT_DRIVER=libvirt, not ironic", done.stderr)


class TLSTest(PhasesTestCase):
    services = f"{ALL_IN_ONE},tls-proxy"

    def test_each_host_has_a_certificate_of_its_own(self) -> None:
        calls = self.run_phase("stack post-config")
        host = socket.gethostname()
        name = f"nova-dmigrate.{host}"
        self.assertIn(
            (
                "make_cert",
                self.node.path("data/CA/int-ca"),
                *(name, name, f"DNS:{host},IP:192.0.2.11"),
            ),
            calls,
        )
        key = Path(self.node.path("etc/nova-dmigrate/key.pem"))
        self.assertEqual(0o600, key.stat().st_mode & 0o777)

    def test_it_can_be_done_without(self) -> None:
        self.node.variables["NOVA_DMIGRATE_TLS"] = "False"
        self.assertNotIn("make_cert", {call[0] for call in self.run_phase("stack post-config")})

    def test_without_the_authority_devstack_ends_early(self) -> None:
        self.node.variables |= {"ENABLED_SERVICES": ALL_IN_ONE, "NOVA_DMIGRATE_TLS": "True"}
        done = self.node.attempt("stack pre-install")
        self.assertNotEqual(0, done.returncode)
        self.assertIn("enable_service tls-proxy", done.stderr)


class ComputeOnlyTest(PhasesTestCase):
    services = COMPUTE

    def test_it_has_the_host_service_and_the_driver(self) -> None:
        self.node.stack()
        self.assertEqual([(str(ROOT), "host")], self.node.called("setup_develop"))
        self.assertEqual("dmigrate-host", self.node.called("run_process")[0][0])
        nova_conf = Path(self.node.path("etc/nova/nova.conf")).read_text()
        self.assertIn("compute_driver = dmigrate.DMigrateDriver", nova_conf)

    def test_what_is_the_controllers_business_is_left_to_it(self) -> None:
        self.node.stack()
        self.assertEqual([], self.node.broker_calls())
        self.assertEqual([], self.node.called("openstack"))
        self.assertFalse(Path(self.node.path("etc/tempest.conf")).exists())


class ControllerOnlyTest(PhasesTestCase):
    services = "rabbit,mysql,key,g-api,n-api,n-sch,n-cond,c-api,c-vol"

    def test_the_api_has_the_package_and_the_broker_its_users(self) -> None:
        self.node.stack()
        self.assertEqual([(str(ROOT),)], self.node.called("setup_develop"))
        self.assertEqual("nova-dmigrate", self.node.broker_calls()[0][1])

    def test_there_are_no_relays(self) -> None:
        self.node.stack()
        self.assertEqual([], self.node.called("run_process"))
        self.assertFalse(Path(self.node.path("etc/nova/nova.conf")).exists())
        self.assertFalse(Path(self.node.path("etc/nova-dmigrate")).exists())
        self.assertFalse(Path(self.node.path("nova/nova/virt/dmigrate")).exists())


class DisabledTest(PhasesTestCase):
    services = COMPUTE

    def setUp(self) -> None:
        super().setUp()
        self.node.variables["DISABLED_SERVICES"] = "dmigrate-host"

    def test_a_host_without_the_service_stays_as_it_was(self) -> None:
        before = self.node.files()
        for phase in STACK:
            self.assertEqual(set(), self.changes(f"stack {phase}"))
        self.assertEqual(before, self.node.files())

    def test_any_hypervisor_will_do_there(self) -> None:
        self.node.variables["VIRT_DRIVER"] = "fake"
        self.node.stack()


class AppArmorTest(PhasesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.rules = Path(self.node.path("apparmor/libvirt-qemu"))
        self.rules.write_text("# of this site\n/srv/guests/** r,\n")

    def test_guests_may_use_the_sockets_once(self) -> None:
        self.node.stack()
        self.node.stack()
        run = self.node.path("run")
        self.assertEqual(
            ["# of this site", "/srv/guests/** r,", f"{run}/** rw,"],
            self.rules.read_text().splitlines(),
        )

    def test_the_rule_goes_again(self) -> None:
        before = self.rules.read_text()
        self.node.stack()
        self.node.run("unstack", "clean")
        self.assertEqual(before, self.rules.read_text())

    def test_where_there_is_no_apparmor_nothing_is_made(self) -> None:
        self.rules.unlink()
        self.rules.parent.rmdir()
        self.node.stack()
        self.assertFalse(self.rules.parent.exists())


class AgainTest(PhasesTestCase):
    services = f"{ALL_IN_ONE},tls-proxy"

    def setUp(self) -> None:
        super().setUp()
        self.node.variables |= {
            "DEVSTACK_PLUGINS": "devstack-plugin-ceph,devstack-plugin-nfs,nova-dmigrate",
            "NOVA_DMIGRATE_ADDRESS": "198.51.100.11",
        }

    def without_calls(self) -> dict[str, str]:
        return {
            name: text
            for name, text in self.node.files().items()
            if not name.startswith(("broker/", "cloud/"))
        }

    def test_stacking_twice_is_as_good_as_once(self) -> None:
        self.node.stack()
        before = self.without_calls()
        self.assertIn("etc/nova-dmigrate/nova-dmigrate.conf", before)
        self.node.stack()
        self.assertEqual(before, self.without_calls())
        self.assertNotIn("create", {call[3] for call in self.node.called("openstack")})

    def test_a_setting_that_was_changed_counts(self) -> None:
        self.node.stack()
        self.node.variables |= {
            "NOVA_DMIGRATE_POLICY": "preferred",
            "RABBIT_PASSWORD": "anotherone",
        }
        self.node.stack()
        files = self.node.files()
        self.assertIn("default_policy = preferred", files["etc/nova/nova.conf"])
        self.assertNotIn("secretrabbit", files["etc/nova-dmigrate/nova-dmigrate.conf"])
        self.assertIn(
            ("change_password", "nova-dmigrate", "password:anotherone"), self.node.broker_calls()
        )

    def test_stacking_after_unstacking_is_as_stacking(self) -> None:
        self.node.stack()
        before = self.without_calls()
        self.node.run("unstack")
        self.node.stack()
        self.assertEqual(before, self.without_calls())
        self.assertEqual({"nova-dmigrate"}, _lines(self.node, "broker/users"))


class UnstackTest(PhasesTestCase):
    def test_the_service_is_stopped_before_the_broker_loses_its_user(self) -> None:
        self.node.stack()
        calls = self.node.run("unstack")
        self.assertIn(("stop_process", "dmigrate-host"), calls)
        self.assertEqual(
            [("delete_user", "nova-dmigrate"), ("delete_vhost", "nova-dmigrate")],
            self.node.broker_calls()[-2:],
        )

    def test_credentials_of_guests_go_and_those_of_others_stay(self) -> None:
        self.node.stack()
        guest = "dmigrate-5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e"
        for name in ("users", "vhosts"):
            with Path(self.node.path(f"broker/{name}")).open("a") as file:
                file.write(f"{guest}\nstackrabbit\ndmigrate-of-somebody-else\n")
        self.node.run("unstack")
        others = {"stackrabbit", "dmigrate-of-somebody-else"}
        self.assertEqual(others, _lines(self.node, "broker/users"))
        self.assertEqual(others, _lines(self.node, "broker/vhosts"))

    def test_a_broker_that_does_not_run_is_no_obstacle(self) -> None:
        self.node.stack()
        self.node.variables["NOVA_DMIGRATE_RABBIT_USERID"] = "somebody"
        broker = Path(self.node.path("broker"))
        broker.rename(broker.with_name("gone"))
        self.assertIn(("stop_process", "dmigrate-host"), self.node.run("unstack"))

    def test_configuration_and_state_stay(self) -> None:
        self.node.stack()
        before = {name for name in self.node.files() if not name.startswith("broker/")}
        self.node.run("unstack")
        after = {name for name in self.node.files() if not name.startswith("broker/")}
        self.assertEqual(before, after)

    def test_a_compute_host_leaves_the_broker_alone(self) -> None:
        self.node.stack()
        known = self.node.broker_calls()
        self.node.variables["ENABLED_SERVICES"] = COMPUTE
        self.node.run("unstack")
        self.assertEqual(known, self.node.broker_calls())


class CleanTest(PhasesTestCase):
    def test_nothing_of_ours_is_left(self) -> None:
        before = self.node.files()
        self.node.stack()
        Path(self.node.path("run")).mkdir()
        self.node.run("unstack", "clean")
        for name in ("etc/nova-dmigrate", "data/nova-dmigrate", "run", "nova/nova/virt/dmigrate"):
            self.assertFalse(os.path.lexists(self.node.path(name)), name)
        # devstack removes its own files itself
        others = ("broker/", "cloud/", "etc/nova/", "etc/tempest.conf")
        left = {name for name in self.node.files() if not name.startswith(others)}
        self.assertEqual(set(before), left)

    def test_a_driver_of_nova_itself_is_not_ours_to_remove(self) -> None:
        driver = Path(self.node.path("nova/nova/virt/dmigrate"))
        driver.mkdir()
        self.node.run("clean")
        self.assertTrue(driver.is_dir())

    def test_cleaning_what_was_never_stacked_does_no_harm(self) -> None:
        before = self.node.files()
        self.node.run("unstack", "clean")
        self.assertEqual(before, self.node.files())


def _lines(node: Node, name: str) -> set[str]:
    return set(Path(node.path(name)).read_text().split())

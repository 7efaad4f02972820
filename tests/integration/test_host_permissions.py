# SPDX-License-Identifier: Apache-2.0
"""What a requester cannot have a host service do."""

import dataclasses
import shutil
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.rpc import client, host_messages
from nova_dmigrate.rpc.host_client import HostChannelTransport
from tests.integration.host_base import MIB, Agent, Hosts
from tests.lab import relays
from tests.lab.agent_port import agent_at
from tests.lab.relays import VOLUME, wait_until
from tests.unit.volumes.loop import LoopDevice


class PermissionsTest(Hosts):
    """What the hosts do not allow."""

    @classmethod
    def options(cls) -> dict[str, object]:
        return {
            "host__max_lease": 5,
            "host__volume_directories": f"{cls.place}/volumes,{cls.place}/vol-*,/dev/loop*",
            "host__map_directories": f"{cls.place}/maps",
            "host__channel_directories": f"{cls.place}/ports",
        }

    def test_a_lease_is_not_longer_than_the_host_wants(self) -> None:
        pair = self.pair(lease_seconds=3600)
        self.assertLessEqual(pair.open_destination().lease_remaining, 5)
        self.assertLessEqual(pair.destination.renew().lease_remaining, 5)

    def test_sockets_are_nowhere_else(self) -> None:
        pair = self.pair()
        for path in (
            "/tmp/qemu",
            str(self.two.sockets),
            f"{self.two.sockets}/a/b/qemu",
            f"{self.two.sockets}/{pair.order.session_id}.control",
            f"{self.two.sockets}//qemu",
        ):
            pair.order = dataclasses.replace(pair.order, qemu_socket=path)
            self.assert_refused("socket-not-allowed", pair.open_destination)
        (self.two.sockets / "link").symlink_to("/tmp")
        self.addCleanup((self.two.sockets / "link").unlink)
        pair.order = dataclasses.replace(pair.order, qemu_socket=f"{self.two.sockets}/link/qemu")
        self.assert_refused("socket-not-allowed", pair.open_destination)

    def test_sockets_are_in_no_directory_of_another_session(self) -> None:
        first, second = self.pair(), self.pair()
        first.open_destination()
        first.destination.wait("running")
        directory = first.incoming.parent
        second.order = dataclasses.replace(second.order, qemu_socket=f"{directory}/other")
        self.assert_refused("in-use", second.open_destination)
        self.assertTrue(directory.is_dir())
        first.destination.client.close_session(first.order.session_id)
        second.open_destination()
        second.destination.client.close_session(second.order.session_id)
        self.assertFalse(directory.exists())

    def test_only_volumes_in_the_allowed_places_are_read(self) -> None:
        volumes = self.place / "volumes"
        volumes.mkdir()
        self.addCleanup(shutil.rmtree, volumes)
        inside, outside = volumes / "inside", self.place / "outside"
        for path in (inside, outside):
            path.write_bytes(bytes(MIB))
        (volumes / "link").symlink_to(outside)
        (self.place / "vol-file").symlink_to(outside)
        for path in (outside, volumes / "link", self.place / "vol-file", "/dev/zero", "/dev"):
            pair = self.pair(volumes={VOLUME: Path(path)})
            self.assert_refused("volume-not-allowed", pair.open_destination)
        device = self.useFixture(LoopDevice(outside)).path
        pair = self.pair(volumes={"a": inside, "b": Path(device)})
        pair.open_destination()
        pair.destination.wait("running")
        pair.destination.client.close_session(pair.order.session_id)
        self.assert_refused(
            "unknown-driver",
            self.client_of(self.two).open_session,
            dataclasses.replace(
                pair.order,
                session_id="other",
                volumes=(host_messages.Volume("v", "tape", "/dev/st0"),),
            ),
        )

    def test_keys_and_units_of_targets_are_not_offered_unless_the_host_says_so(self) -> None:
        pair, client = self.pair(), self.client_of(self.two)
        self.assertFalse({"iscsi", "luks"} & set(client.hello(10).drivers))
        unit = "raw:iscsi://127.0.0.1:3260/iqn.x:volume-1/1"
        for driver, location, code in (
            ("luks", f"luks,key=a:{self.place}/volumes/image", "unknown-driver"),
            ("iscsi", unit, "unknown-driver"),
            # By another driver's name
            ("nbd", unit, "volume-not-allowed"),
        ):
            order = dataclasses.replace(
                pair.order, volumes=(host_messages.Volume("v", driver, location),)
            )
            self.assert_refused(code, client.open_session, order)

    def test_only_rbd_images_with_allowed_names_are_read_and_with_the_hosts_own_files(self) -> None:
        pair = self.pair()
        for location in ("volumes/image-1", "volumes/volume-1?conf=/tmp/ceph.conf", "/dev/vdb"):
            self.assert_refused(
                "volume-not-allowed",
                self.client_of(self.two).open_session,
                dataclasses.replace(
                    pair.order, volumes=(host_messages.Volume("v", "rbd", location),)
                ),
            )

    def test_only_maps_in_the_allowed_place_are_read(self) -> None:
        maps, outside = self.place / "maps", self.place / "outside.map"
        maps.mkdir()
        self.addCleanup(shutil.rmtree, maps)
        outside.write_bytes(bytes(MIB))
        (maps / "link").symlink_to(outside)
        good, wrong = maps / "map", (outside, maps / "link", self.place / "maps-2")
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        for path in wrong:
            for saved in (relays.SavedMap(path, good), relays.SavedMap(good, path)):
                pair.saved = saved
                self.assert_refused("map-not-allowed", pair.open_source)
        pair.saved = None
        pair.open_source()
        pair.source.wait("running")
        use_map = pair.source.client.use_map
        for path in wrong:
            for files in ((path, good), (good, path)):
                self.assert_refused(
                    "map-not-allowed", use_map, pair.order.session_id, *map(str, files)
                )
        use_map(pair.order.session_id, str(good), str(good))
        wait_until(
            lambda: (pair.source.progress() or {}).get("map") == "refused", "it was looked for"
        )

    def test_maps_are_put_into_the_allowed_place_only(self) -> None:
        maps, ports, outside = self.place / "maps", self.place / "ports", self.place / "outside.map"
        for directory in (maps, ports):
            directory.mkdir()
            self.addCleanup(shutil.rmtree, directory)
        outside.touch()
        (maps / "link").symlink_to(outside)
        (maps / "deep").mkdir()
        (maps / "deep" / "map").touch()
        with agent_at(ports / "port", Agent()):
            way = HostChannelTransport("an-instance", self.client_of(self.two), str(ports / "port"))
            for path, code in (
                (outside, "map-not-allowed"),
                (maps / "deep" / "map", "map-not-allowed"),
                (maps / "link", "map-file"),
                (self.place / "maps-2", "map-not-allowed"),
            ):
                file = client.MapFile(str(path), 4096)
                error = self.assertRaises(
                    exception.AgentRefused, way.save_chunks, "m", 1, file, 5.0
                )
                self.assertEqual(code, error.kwargs["code"])
        self.assertEqual(b"", outside.read_bytes())

    def test_an_agent_is_asked_through_the_service(self) -> None:
        ports = self.place / "ports"
        ports.mkdir()
        self.addCleanup(shutil.rmtree, ports)
        host = self.client_of(self.two)
        with agent_at(ports / "port", Agent()), agent_at(self.place / "elsewhere", Agent()):
            transport = HostChannelTransport("an-instance", host, str(ports / "port"))
            asked = client.AgentClient("an-instance", transport)
            for _ in range(3):
                self.assertEqual("the-agent", asked.ping().incarnation)
            (ports / "link").symlink_to(self.place / "elsewhere")
            for path in (ports / "link", self.place / "elsewhere", Path("/dev/null")):
                transport = HostChannelTransport("an-instance", host, str(path))
                error = self.assertRaises(
                    exception.AgentRefused, client.AgentClient("an-instance", transport).ping
                )
                self.assertEqual("channel-not-allowed", error.kwargs["code"])
        settings = client.ClientSettings(timeout=1, attempts=1)
        transport = HostChannelTransport("an-instance", host, str(ports / "port"))
        silent = client.AgentClient("an-instance", transport, settings)
        self.assertRaises(exception.AgentUnreachable, silent.ping)

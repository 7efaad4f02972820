# SPDX-License-Identifier: Apache-2.0
"""The lab of two libvirt hosts: if these fail, no other test over libvirt means anything."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import libvirt
import numpy as np

from nova_dmigrate.buffermap import PAGE_SIZE
from tests import base
from tests.lab import GuestSpec, HeartbeatRecorder, create_disk, end, relays, spawn, workspace
from tests.lab.domains import FLAGS, Domain
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import inmates
from tests.lab.relays import RelayPair, wait_until

ROOT = Path(__file__).parents[2]
#: One path on both hosts: the source relay's socket on one, QEMU's on the other.
MIGRATION_SOCKET = Path("/run/guests/migration.sock")

# A process that is killed while it has a lab with a guest, and another network.
DOOMED = """
import sys, time
from pathlib import Path
from tests.lab import GuestSpec, HostPair, create_disk, processes
from tests.lab.domains import Domain
from tests.lab.libvirt_hosts import LibvirtHosts
directory = Path(sys.argv[1])
with LibvirtHosts(directory) as hosts, HostPair() as (other, _):
    spec = GuestSpec(create_disk(directory / "disk.raw", 16), ram_mb=128, fill_mb=16)
    with Domain(hosts, spec) as domain:
        domain.start(hosts.a)
        namespaces = [host.namespace for host in (hosts.a, hosts.b, other)]
        print(processes.register._reaper.pid, *namespaces, flush=True)
        time.sleep(600)
"""
# What hosts shall reach: says hello to each client.
SERVER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True: server.accept()[0].sendall(b"hello")
"""
CLIENT = """
import socket, sys
print(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10).makefile().read())
"""


def network_of(namespace: str) -> int:
    """Number of a network namespace."""
    return Path("/run/netns", namespace).stat().st_ino


def remains(directory: Path, networks: set[int]) -> list[str]:
    """What is left of a lab whose hosts were in a directory and had these network namespaces."""
    found = [str(path) for path in directory.glob("ndm*")]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.joinpath("ns/net").stat().st_ino in networks:
                found.append(f"process {process.name}")
            elif str(directory) in process.joinpath("mountinfo").read_text():
                found.append(f"mounts of process {process.name}")
    for file in Path("/run/netns").iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_ino in networks:
                found.append(str(file))
    for record in Path("/run").glob("nova-dmigrate-lab-*/owner"):
        with contextlib.suppress(OSError):
            if str(directory) in record.read_text():
                found.append(str(record))
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(directory) in device.read_text():
                found.append(str(device))
    return found


class LabTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self._ends = contextlib.ExitStack()
        self.addCleanup(self._ends.close)
        self.directory = self._ends.enter_context(workspace())

    def assert_nothing_is_left(self, networks: set[int]) -> None:
        # A process that was killed is gone a moment later.
        wait_until(
            lambda: not remains(self.directory, networks),
            f"nothing is left of {networks}: {remains(self.directory, networks)}",
        )


class TestLifeOfALab(LabTestCase):
    def doomed(self) -> tuple["subprocess.Popen[str]", int, set[int]]:
        """A process with a running lab, its reaper, the lab's networks."""
        argv = [sys.executable, "-c", DOOMED, str(self.directory)]
        process = spawn(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._ends.callback(end, process)
        assert process.stdout is not None
        reaper, *namespaces = process.stdout.readline().split()
        networks = {network_of(namespace) for namespace in namespaces}
        self.assertNotEqual([], remains(self.directory, networks))
        return process, int(reaper), networks

    def test_it_leaves_nothing_behind(self) -> None:
        with LibvirtHosts(self.directory) as hosts:
            networks = {network_of(host.namespace) for host in (hosts.a, hosts.b)}
            self.assertNotEqual([], remains(self.directory, networks))
        self.assert_nothing_is_left(networks)

    def test_one_that_cannot_start_says_why_and_leaves_nothing_behind(self) -> None:
        program = self.directory / "libvirtd"
        program.write_text("#!/bin/sh\necho out of order >&2; exit 1\n")
        program.chmod(0o755)
        path = os.environ["PATH"]
        self.addCleanup(os.environ.__setitem__, "PATH", path)
        os.environ["PATH"] = f"{self.directory}:{path}"
        with self.assertRaisesRegex(Exception, "out of order"):
            LibvirtHosts(self.directory)
        program.unlink()
        self.assertEqual([], list(self.directory.iterdir()))
        self.assert_nothing_is_left(set())

    def test_two_do_not_see_each_other(self) -> None:
        with LibvirtHosts(self.directory) as one, LibvirtHosts(self.directory) as other:
            hosts = [one.a, one.b, other.a, other.b]
            names = [host.run(["hostname"]).stdout.strip() for host in hosts]
            self.assertEqual([host.name for host in hosts], names)
            self.assertEqual(4, len(set(names)))
            # The same address is each lab's own host.
            for lab in (one, other):
                argv = ["virsh", "--connect", lab.b.peer_uri, "hostname"]
                self.assertEqual(lab.b.name, lab.a.run(argv).stdout.strip())

    def test_a_killed_process_leaves_nothing_behind(self) -> None:
        process, _, networks = self.doomed()
        process.kill()
        self.assert_nothing_is_left(networks)

    def test_what_a_killed_reaper_leaves_is_swept_and_the_living_are_spared(self) -> None:
        with LibvirtHosts(self.directory / "..") as living:
            process, reaper, networks = self.doomed()
            os.kill(reaper, signal.SIGKILL)
            process.kill()
            process.wait()
            # A lab that another test starts at this moment sweeps as well
            self.assertLessEqual(len(LibvirtHosts.sweep()), 1)
            self.assert_nothing_is_left(networks)
            self.assertEqual(living.a.name, living.a.run(["hostname"]).stdout.strip())
            self.assertEqual([], LibvirtHosts.sweep())


class TestDomains(LabTestCase):
    """One guest serves all of these; it stays where a test has left it."""

    lab: ClassVar[contextlib.ExitStack]
    hosts: ClassVar[LibvirtHosts]
    domain: ClassVar[Domain]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.lab = contextlib.ExitStack()
        try:
            directory = cls.lab.enter_context(workspace())
            cls.hosts = cls.lab.enter_context(LibvirtHosts(directory))
            disk = create_disk(directory / "disk.raw", 112)
            spec = GuestSpec(disk, ram_mb=192, fill_mb=96)
            cls.domain = cls.lab.enter_context(Domain(cls.hosts, spec)).start(cls.hosts.a)
        except BaseException:
            cls.lab.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls.lab.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.hosts.shape, None)
        self.addCleanup(self.hosts.heal)
        self.domain.guest.command("dirty 0 0")
        self.content = self.domain.guest.command("sum")
        self.source = self.domain.host
        self.destination = self.hosts.other(self.source)

    def turn_round(self) -> None:
        self.source, self.destination = self.destination, self.source

    def sent(self, host: LibvirtHost) -> int:
        """Bytes that a host has sent over the migration network."""
        return self.hosts.link.counters()[(self.hosts.a, self.hosts.b).index(host)]

    def assert_moved(self) -> None:
        """The guest is at the destination alone, with the same content."""
        self.assertIs(self.destination, self.domain.host)
        self.assertEqual(self.content, self.domain.guest.command("sum"))
        self.assertRaises(libvirt.libvirtError, self.domain.on, self.source)
        self.assertTrue(self.domain.on(self.destination).isPersistent())
        self.assertEqual([], self.qemus(self.source))
        self.assertEqual([self.domain.guest.pid], self.qemus(self.destination))

    def qemus(self, host: LibvirtHost) -> list[int]:
        """QEMUs on a host."""
        return [
            pid
            for pid, arguments in inmates(host.namespace).items()
            if arguments and "qemu-system" in arguments[0]
        ]

    def test_memory_is_exact(self) -> None:
        (block,) = re.findall(
            r" pc\.ram +\d+ \w+ +0x\w+ +0x\w+ +(0x\w+)", self.domain.guest.hmp("info ramblock")
        )
        self.assertEqual(self.domain.spec.ram_bytes, int(block, 16))
        self.assertNotEqual(0, int(block, 16) % (256 << 10))
        summary = self.domain.guest.qmp("query-memory-size-summary")
        self.assertEqual(self.domain.spec.ram_bytes, summary["base-memory"])
        self.assertEqual(self.domain.spec.ram_bytes, self.domain.guest.ram.size)

    def test_memory_and_map_are_seen_from_outside(self) -> None:
        guest, offset = self.domain.guest.buffer_map_extents()
        disk = np.memmap(self.domain.volume, np.uint8, "r").reshape(-1, PAGE_SIZE)
        expected = disk[(offset // PAGE_SIZE).astype(np.int64)]
        actual = self.domain.guest.ram[self.domain.guest.page_of(guest)]
        self.assertTrue((expected == actual).all())

    def test_pre_copy_over_tcp_there_and_back(self) -> None:
        for _ in range(2):
            before = self.sent(self.source)
            with HeartbeatRecorder(self.domain.guest) as recorder:
                self.domain.guest.command("beat on")
                wait_until(lambda seen=recorder: seen.times().size > 100, "the guest's beats")
                statistics = self.domain.migrate()
            self.domain.guest.command("beat off")
            self.assertGreater(statistics["downtime"], 0)
            self.assertGreater(self.sent(self.source) - before, statistics["memory_normal_bytes"])
            self.assert_moved()
            self.turn_round()

    def test_post_copy(self) -> None:
        # As slow as it takes to have most of it behind the switchover
        self.hosts.shape(20)
        migration = self.domain.begin_migration(flags=FLAGS | libvirt.VIR_MIGRATE_POSTCOPY)
        migration.start_post_copy()
        wait_until(
            lambda: self.domain.on(self.destination).info()[0] == libvirt.VIR_DOMAIN_RUNNING,
            "the guest runs at the destination",
        )
        self.assertTrue(migration.running)
        self.hosts.shape(None)
        migration.wait()
        self.assert_moved()

    def test_over_a_unix_uri_through_relays_there_and_back(self) -> None:
        for saved in (None, relays.save_map(self.domain.guest, self.directory / "map")):
            before = self.sent(self.source)
            with RelayPair(
                self.directory / "relays",
                MIGRATION_SOCKET,
                outgoing=MIGRATION_SOCKET,
                hosts=(self.source, self.destination),
                volumes={relays.VOLUME: self.domain.volume},
                saved=saved,
            ) as pair:
                self.domain.migrate(uri=f"unix:{MIGRATION_SOCKET}")
                self.assertEqual((0, 0), pair.wait(), pair.last_words())
                summary = pair.source.summary()
            self.assertEqual("delivered", summary["state"])
            self.assertEqual(saved is not None, summary["referenced_pages"] > 0)
            sent = self.sent(self.source) - before
            self.assertGreater(sent, summary["wire_bytes"])
            self.assertLess(sent, summary["wire_bytes"] * 1.1 + (1 << 20))
            for host in (self.source, self.destination):
                self.assertFalse(host.outside(MIGRATION_SOCKET).exists(), host.name)
            self.assert_moved()
            self.turn_round()

    def test_a_shaped_link_slows_it_down_until_the_shape_is_lifted(self) -> None:
        rate = 16e6
        self.hosts.shape(rate / 1e6)
        begun, before = time.monotonic(), self.sent(self.source)
        migration = self.domain.begin_migration()
        wait_until(lambda: self.sent(self.source) - before > 2 * rate, "two seconds' worth")
        sent, passed = self.sent(self.source) - before, time.monotonic() - begun
        # Never more than the link carries; how much less is up to the machine.
        self.assertLess(sent, rate * passed * 1.1 + 200_000)
        self.assertTrue(migration.running)
        self.hosts.shape(None)
        statistics = migration.wait()
        self.assertGreater(statistics["time_elapsed"], 1500)
        self.assert_moved()

    def test_a_cut_link_holds_it_up_until_it_is_healed(self) -> None:
        self.hosts.shape(16)
        begun = self.sent(self.source)
        migration = self.domain.begin_migration()
        wait_until(lambda: self.sent(self.source) - begun > 4e6, "it is on its way")
        self.hosts.cut()
        received = self.sent(self.source)
        time.sleep(1)
        self.assertEqual(received, self.sent(self.source))
        self.assertTrue(migration.running)
        self.assertEqual("pong", self.domain.guest.command("ping"))
        self.hosts.shape(None)
        self.hosts.heal()
        migration.wait()
        self.assert_moved()

    def test_an_aborted_one_leaves_the_guest_where_it_was(self) -> None:
        self.hosts.shape(16)
        migration = self.domain.begin_migration()
        wait_until(lambda: migration.statistics().get("memory_processed", 0) > 0, "it has begun")
        migration.abort()
        self.assertRaises(libvirt.libvirtError, migration.wait)
        self.assertIs(self.source, self.domain.host)
        self.assertEqual(self.content, self.domain.guest.command("sum"))
        wait_until(lambda: not self.qemus(self.destination), "the destination's QEMU has ended")

    def test_the_guest_outlives_its_libvirtd(self) -> None:
        self.source.kill_libvirtd()
        self.assertEqual("pong", self.domain.guest.command("ping"))
        self.source.start_libvirtd()
        self.assertTrue(self.domain.on(self.source).isActive())
        self.assertEqual("running", self.domain.guest.status)
        self.domain.migrate()
        self.assert_moved()

    def test_a_host_reaches_the_servers_of_the_machine(self) -> None:
        server = spawn(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._ends.callback(end, server)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        client = [sys.executable, "-c", CLIENT, str(port)]
        self.assertRaises(subprocess.CalledProcessError, self.source.run, client)
        self.source.forward(port)
        for _ in range(2):
            self.assertEqual("hello\n", self.source.run(client).stdout)

# SPDX-License-Identifier: Apache-2.0
"""The domain of a migration, as long as it is looked at and no longer."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from nova_dmigrate.migration.libvirt_guest import LibvirtGuest
from tests import base
from tests.lab import GuestSpec, create_disk, workspace
from tests.lab.domains import Domain
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import wait_until


def _sockets() -> set[str]:
    """Of this process."""
    found = set()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(each))
    return {name for name in found if name.startswith("socket:")}


class TestLibvirtGuest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        lab = contextlib.ExitStack()
        self.addCleanup(lab.close)
        directory = lab.enter_context(workspace())
        hosts = lab.enter_context(LibvirtHosts(directory))
        spec = GuestSpec(create_disk(directory / "disk.raw", 16), ram_mb=128, fill_mb=16)
        self.domain = lab.enter_context(Domain(hosts, spec)).start(hosts.a)
        self.host = hosts.a

    def look(self) -> LibvirtGuest:
        return LibvirtGuest(self.host.uri, self.domain.name)

    def test_one_that_is_closed_keeps_no_connection(self) -> None:
        self.look().close()
        before = _sockets()
        guest = self.look()
        self.assertTrue(guest.runs_here)
        self.assertEqual(1, len(_sockets() - before))
        guest.close()  # but something may refer to it for long
        wait_until(lambda: _sockets() <= before, "the connection is closed")

    def test_one_whose_libvirtd_was_restarted_is_seen_again(self) -> None:
        self.look().close()
        before = _sockets()
        guest = self.look()
        self.host.kill_libvirtd()
        self.host.start_libvirtd()
        wait_until(lambda: guest.job() is None and guest.runs_here, "the domain is seen")
        guest.close()
        wait_until(lambda: _sockets() <= before, "both connections are closed")

    def test_threads_that_ask_it_meet_neither_its_restart_nor_its_end(self) -> None:
        self.look().close()
        before = _sockets()
        guest = self.look()
        over = threading.Event()
        trouble: list[BaseException] = []
        asked = [0] * 6

        def ask(number: int) -> None:
            try:
                while not over.is_set():
                    self.assertTrue(guest.runs_here)
                    guest.job()
                    asked[number] += 1
            except BaseException as error:  # noqa: BLE001 - raised again below
                trouble.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
        for each in threads:
            each.start()
        try:
            for _ in range(2):
                self.host.kill_libvirtd()
                self.host.start_libvirtd()
                seen = list(asked)
                wait_until(
                    lambda seen=seen: all(new > old for new, old in zip(asked, seen, strict=True)),
                    "all of them have their answers",
                )
            guest.close()
            time.sleep(0.5)
        finally:
            over.set()
            for each in threads:
                each.join()
        self.assertEqual([], trouble)
        wait_until(lambda: _sockets() <= before, "all connections are closed")

    def test_one_whose_libvirtd_is_gone_has_no_version_known(self) -> None:
        with self.look() as guest:
            version = guest.libvirt_version
            self.host.kill_libvirtd()
            self.assertIsNone(guest.libvirt_version)
            self.host.start_libvirtd()
            self.assertEqual(version, guest.libvirt_version)

    def test_nobody_waits_for_a_qemu_that_hangs(self) -> None:
        qemu = self.domain.guest.pid
        with self.look() as guest:
            os.kill(qemu, signal.SIGSTOP)
            try:
                # libvirt itself waits without end
                for limit in (100, 200, 200):
                    self.assertFalse(guest.set_max_downtime(limit))
                guest.abort()
                self.assertIsNone(guest.job())
            finally:
                os.kill(qemu, signal.SIGCONT)
            wait_until(lambda: guest.set_max_downtime(200), "QEMU is told the last of the limits")
            self.assertEqual(200, guest.max_downtime(lambda: None))

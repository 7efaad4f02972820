# SPDX-License-Identifier: Apache-2.0

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

from nova_dmigrate import exception
from nova_dmigrate.agent import processes
from tests import base

UNIX = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 101 /run/mysqld/mysqlx.sock
0000000000000000: 00000002 00000000 00010000 0001 01 102 /run/my sql/mysqld.sock
0000000000000000: 00000003 00000000 00000000 0001 03 103 /run/mysqld/connected.sock
0000000000000000: 00000003 00000000 00000000 0001 03 104
0000000000000000: 00000002 00000000 00010000 0001 01 105 /run/other.sock
"""


class Proc:
    """A /proc of processes that do not exist."""

    def __init__(self, root):
        self.root = root
        self.proc = root / "proc"
        self.proc.mkdir()

    def server(
        self,
        pid,
        datadir,
        comm="mysqld",
        exe="/usr/sbin/mysqld",
        root="/",
        sockets=(),
        uids="70 0 0 0",
    ):
        directory = self.proc / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "net").mkdir()
        (directory / "comm").write_text(f"{comm}\n")
        fields = ["S", "1", *["0"] * 17, str(1000 + pid), "0"]
        (directory / "stat").write_text(f"{pid} (my) sq l)) {' '.join(fields)}\n")
        (directory / "status").write_text(f"Name:\t{comm}\nUid:\t{uids}\nGid:\t0\t0\t0\t0\n")
        (directory / "exe").symlink_to(exe)
        (directory / "cwd").symlink_to(datadir)
        (directory / "root").symlink_to(root)
        (directory / "net" / "unix").write_text(UNIX)
        for number, inode in enumerate(sockets):
            (directory / "fd" / str(number)).symlink_to(f"socket:[{inode}]")
        (directory / "fd" / "9").symlink_to("/var/lib/mysql/ibdata1")


class FindTest(base.TestCase):
    def setUp(self):
        super().setUp()
        self.root = self.make_directory()
        self.proc = Proc(self.root)
        patch = mock.patch.object(processes, "_PROC", str(self.proc.proc))
        patch.start()
        self.addCleanup(patch.stop)

    def find(self, **selector):
        return processes.find_servers(processes.Selector(**{"users": ("70",), **selector}))

    def pids(self, **selector):
        return [server.pid for server in self.find(**selector)]

    def test_a_server_is_described_as_it_sees_itself(self):
        self.proc.server(
            70,
            f"{self.root}/chroot/var/lib/mysql",
            comm="mariadbd",
            exe=f"{self.root}/chroot/usr/sbin/mariadbd (deleted)",
            root=f"{self.root}/chroot",
            sockets=(101, 102, 103, 104),
        )
        (server,) = self.find()
        self.assertEqual("/usr/sbin/mariadbd", server.executable)
        self.assertEqual("/var/lib/mysql", server.datadir)
        self.assertEqual("/run/my sql/mysqld.sock", server.socket)
        self.assertEqual(1070, server.start_time)
        self.assertEqual(f"{self.proc.proc}/70/root", server.root)
        self.assertEqual(70, server.uid)

    def test_several_servers_are_told_apart(self):
        for pid, name in ((5, "a"), (30, "b"), (200, "c")):
            self.proc.server(pid, f"/srv/{name}", sockets=(102,) if name == "b" else ())
        self.proc.server(6, "/", comm="mysqld_safe", exe="/bin/dash")
        self.proc.server(7, "/", comm="bash", exe="/bin/bash")
        self.assertEqual([5, 30, 200], self.pids())
        self.assertEqual([200], self.pids(pid=200))
        self.assertEqual([30], self.pids(datadir="/srv/b/"))
        self.assertEqual([30], self.pids(socket="/run/my sql/mysqld.sock"))
        for wrong in ({"pid": 7}, {"pid": 9}, {"datadir": "/srv"}, {"pid": 5, "datadir": "/srv/b"}):
            error = self.assertRaises(exception.ServerNotFound, self.find, **wrong)
            for value in wrong.values():
                self.assertIn(str(value), str(error))

    def test_a_data_directory_may_be_named_as_we_see_it(self):
        datadir = self.root / "chroot" / "data"
        datadir.mkdir(parents=True)
        self.proc.server(5, str(datadir), root=str(self.root / "chroot"))
        self.assertEqual([5], self.pids(datadir="/data"))
        self.assertEqual([5], self.pids(datadir=str(datadir)))

    def test_a_server_that_has_renamed_itself_is_known_by_its_program(self):
        self.proc.server(5, "/srv", comm="connection", exe="/opt/bin/mysqld (deleted)")
        self.assertEqual([5], self.pids())

    def test_processes_that_end_meanwhile_are_none(self):
        self.proc.server(5, "/srv/a")
        (self.proc.proc / "6").mkdir()
        self.proc.server(7, "/srv/b")
        (self.proc.proc / "7" / "cwd").unlink()
        self.assertEqual([5], self.pids())

    def test_a_server_that_may_not_be_looked_at_is_a_missing_privilege(self):
        self.proc.server(5, "/srv/a")
        refusal = PermissionError(13, "Permission denied")
        with mock.patch.object(processes, "_socket", side_effect=refusal):
            error = self.assertRaises(exception.PrivilegeError, self.find)
        self.assertIn("CAP_SYS_PTRACE", str(error))

    def test_what_runs_as_another_user_is_no_server(self):
        self.proc.server(5, "/srv/a", uids="4000000001 70 70 70")
        self.proc.server(6, "/srv/b")
        self.assertEqual([6], self.pids())
        self.assertEqual([5, 6], self.pids(users=("4000000001", "70", "no-such-user")))
        self.assertEqual([5], self.pids(users=("4000000001",)))
        for number in range(100, 110):
            self.proc.server(number, "/", uids="4000000000 0 0 0")
        error = self.assertRaises(exception.ServerNotFound, self.find, users=())
        self.assertIn("process 5 looks like a server but runs as user 4000000001", str(error))
        self.assertIn("process 100 looks like a server but runs as user 4000000000", str(error))
        self.assertEqual(3, str(error).count("[agent]server_users"))

    def test_what_may_not_be_looked_at_and_is_no_server_is_no_missing_privilege(self):
        self.proc.server(5, "/srv/a", uids="71 71 71 71")
        refusal = PermissionError(13, "Permission denied")
        with mock.patch.object(processes, "_socket", side_effect=refusal):
            self.assertRaises(exception.ServerNotFound, self.find)

    def test_none_at_all_is_an_error_that_says_so(self):
        error = self.assertRaises(exception.ServerNotFound, self.find)
        self.assertIn("neither mysqld nor mariadbd", str(error))


class PathTest(base.TestCase):
    """Links are resolved in the server's world, not in ours."""

    def setUp(self):
        super().setUp()
        self.root = self.make_directory()
        (self.root / "var/lib/mysql/db").mkdir(parents=True)
        (self.root / "data").mkdir()
        self.server = processes.ServerProcess(
            1, 1, "/mysqld", "/var/lib/mysql", str(self.root), None, 0
        )

    def inside(self, path):
        return os.path.relpath(self.server.path(path), self.root)

    def test_relative_paths_are_relative_to_the_data_directory(self):
        self.assertEqual("var/lib/mysql/db/t.ibd", self.inside("./db//t.ibd"))
        self.assertEqual("x", self.inside("/x"))

    def test_absolute_and_relative_links_stay_inside(self):
        (self.root / "var/lib/mysql/far").symlink_to("/data")
        (self.root / "var/lib/mysql/near").symlink_to("../../../data/")
        (self.root / "var/lib/mysql/out").symlink_to("../../../../../../data")
        for name in ("far", "near", "out"):
            self.assertEqual("data/t.ibd", self.inside(f"{name}/t.ibd"))

    def test_links_in_a_circle_are_an_error(self):
        (self.root / "a").symlink_to("b")
        (self.root / "b").symlink_to("/a")
        self.assertRaises(OSError, self.server.path, "/a")

    def test_a_socket_in_such_a_circle_is_an_error_of_the_server(self):
        (self.root / "a").symlink_to("a")
        server = dataclasses.replace(self.server, socket="/a")
        error = self.assertRaises(exception.ServerError, getattr, server, "socket_path")
        self.assertIn("/a: ", str(error))
        self.assertIsNone(self.server.socket_path)


class SocketsTest(base.TestCase):
    def test_a_path_with_line_breaks_makes_no_errors(self):
        for line in (
            "x: 2 2 zz 1 1 101 /forged",
            "0: 00000002 00000000 00010000 0001 01 \u00b2 /forged",
            "0: 00000002 00000000 0001000 0001 01 101 /forged",
            "",
        ):
            self.assertEqual(
                ["/run/mysqld/mysqlx.sock"], processes.parse_sockets(f"{line}\n{UNIX}", {101})
            )


class RealProcessTest(base.TestCase):
    def test_a_listening_socket_is_found_among_those_of_a_process(self):
        path = str(self.make_directory() / "s.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            self.assertEqual(path, processes._socket(os.getpid()))

    def test_a_process_is_running_until_it_ends(self):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.addCleanup(child.stdin.close)
        started = processes.read_start_time(child.pid)
        server = processes.ServerProcess(child.pid, started, "", "/", "/", None, 0)
        self.assertTrue(server.running)
        self.assertFalse(
            processes.ServerProcess(child.pid, started + 1, "", "/", "/", None, 0).running
        )
        child.kill()
        child.wait()
        self.assertFalse(server.running)

    def test_start_times_are_those_of_the_kernel(self):
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
        ticks = os.sysconf("SC_CLK_TCK")
        age = uptime - processes.read_start_time(os.getpid()) / ticks
        self.assertTrue(Path("/proc/self").exists() and 0 <= age < uptime)

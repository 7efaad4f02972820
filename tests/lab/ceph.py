# SPDX-License-Identifier: Apache-2.0
"""A private Ceph: one monitor and one OSD on loopback, all below one directory.

with Ceph() as ceph:
    ceph.create_pool("volumes")
    ceph.create_image("volumes", "volume-1", 64 << 20)
    ceph.add_client("reader", osd="profile rbd-read-only pool=volumes")
    location = f"volumes/volume-1?id=reader&conf={ceph.configuration}"

The daemons are plain processes, without ceph-volume and without systemd. There is no manager unless
one is asked for: nothing that images need does, but who reckons how much room a pool has.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab import processes
from tests.lab.broker import free_ports

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "rbd")
#: Seconds that anything may take before a test says that it hangs.
_PATIENCE = 240
#: Bytes of the OSD's device, a sparse file; RocksDB takes its share of them.
_STORE_BYTES = 4 << 30
_PLACEMENT_GROUPS = 8
#: Of the manager: what it does of its own accord, which takes time and makes pools.
_IDLE_MODULES = (
    *("balancer", "crash", "devicehealth", "orchestrator", "pg_autoscaler", "progress"),
    *("rbd_support", "restful", "status", "telemetry", "volumes", "iostat", "nfs"),
)
_LOOPBACK = "127.0.0.1"
#: Of monitors, where nobody else has it; clients that are told no kind of address know it.
_MONITOR_PORT = 3300


def missing() -> str | None:
    """Why there can be no Ceph on this machine; None if there can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"no {', '.join(lacking)}: install the packages of bindep.txt"
    return missing_modules()


def missing_modules() -> str | None:
    """Why there can be no client of Ceph in this Python; None if there can."""
    try:
        import rados  # noqa: F401
        import rbd  # noqa: F401
    except ImportError as error:
        return f"{error}: make the virtual environment anew"
    return None


class Ceph:
    """One cluster. A context manager; what it has started is gone at its end.

    :ivar configuration: the file that clients need, with the place of their keyrings in it.
    :ivar monitor: address of the monitor, as clients take it for ``mon_host``.
    :ivar start_seconds: from nothing to an OSD that serves.
    """

    def __init__(self, address: str = _LOOPBACK, manager: bool = False) -> None:
        """:param address: of this machine, for all daemons; its own if it is not the loopback's.
        :param manager: whether there shall be one.
        """
        self.directory = processes.make_workspace()
        self.configuration = self.directory / "ceph.conf"
        self.start_seconds = 0.0
        self._address, self._manager = address, manager
        (port,) = free_ports(1) if address == _LOOPBACK else (_MONITOR_PORT,)
        self.monitor = f"v2:{address}:{port}"
        self._fsid, self._osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
        self._daemons: dict[str, subprocess.Popen[Any]] = {}
        self._admin: Any = None

    def __enter__(self) -> "Ceph":
        started = time.monotonic()
        try:
            self._write_configuration()
            self._make_monitor()
            self._start("mon", "a")
            self._make_osd()
            self._connect_admin()
            self.command("osd new", uuid=self._osd_uuid, id=0)
            if self._manager:
                self._start_manager()
            self.start_osd()
        except BaseException as error:
            error.add_note(self.last_words())
            self.close()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, whatever state it is in."""
        # Its client waits for monitors that are gone
        if self._admin is not None:
            if "mon" in self._daemons:
                self._daemons["mon"].send_signal(signal.SIGCONT)
            self._admin.shutdown()
            self._admin = None
        for daemon in self._daemons.values():
            processes.end(daemon)
        self._daemons.clear()
        processes.drop_workspace(self.directory)

    # What tests do to it

    def kill_osd(self, noticed: bool = True) -> None:
        """End the OSD as a crash does.

        :param noticed: whether the monitors know at once, as those of a larger cluster do.
        """
        daemon = self._daemons.pop("osd")
        daemon.kill()
        processes.end(daemon)
        if noticed:
            # Otherwise what it had promised to its clients (read leases) may hold up the next one
            # for 16 s
            self.command("osd down", ids=["0"], definitely_dead=True)

    def start_osd(self) -> None:
        """Start the OSD, and wait until it serves."""
        _, before = self._osd_state()
        self._start("osd", "0")
        deadline = time.monotonic() + _PATIENCE
        # It may still be taken for up when it has just been killed
        while self._osd_state() <= (True, before):
            if self._daemons["osd"].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the OSD does not come up: {self.last_words()}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """Daemons ("mon", "osd") that hang meanwhile: silent, with their connections open."""
        for name in names:
            self._daemons[name].send_signal(signal.SIGSTOP)
        try:
            for name in names:
                _wait_stopped(self._daemons[name].pid)
            yield
        finally:
            for name in names:
                self._daemons[name].send_signal(signal.SIGCONT)

    # What clients need

    def create_pool(self, name: str) -> None:
        self.command("osd pool create", pool=name, pg_num=_PLACEMENT_GROUPS)
        self.command("osd pool application enable", pool=name, app="rbd")

    def create_namespace(self, pool: str, name: str) -> None:
        import rbd

        with self.pool(pool) as ioctx:
            rbd.RBD().namespace_create(ioctx, name)

    def add_client(self, name: str, osd: str) -> None:
        """Let a client in with these capabilities; the configuration knows its keyring."""
        path = self._make_keyring(f"client.{name}", {"mon": "profile rbd", "osd": osd})
        self.command("auth import", path.read_bytes())

    def keyring(self, client: str) -> Path:
        return self.directory / f"ceph.client.{client}.keyring"

    def key(self, client: str) -> str:
        """What is in it, in base64."""
        name = f"client.{client}"
        return _run(["ceph-authtool", self.keyring(client), "--print-key", "--name", name]).strip()

    def room(self, pool: str) -> int | None:
        """Bytes that a pool can still take, as the manager has reckoned; None if it has not yet."""
        pools = {each["name"]: each["stats"] for each in json.loads(self.command("df"))["pools"]}
        return pools[pool]["max_avail"] or None if pool in pools else None

    def create_image(self, pool: str, name: str, size: int, namespace: str = "") -> None:
        import rbd

        with self.pool(pool, namespace) as ioctx:
            rbd.RBD().create(ioctx, name, size)

    def write(self, pool: str, name: str, offset: int, data: bytes, namespace: str = "") -> None:
        """Write to an image as another host does: with a client of its own, past any cache."""
        import rbd

        with self.pool(pool, namespace) as ioctx, rbd.Image(ioctx, name) as image:
            image.write(data, offset)

    def remove_image(self, pool: str, name: str, namespace: str = "") -> None:
        import rbd

        with self.pool(pool, namespace) as ioctx:
            rbd.RBD().remove(ioctx, name)

    def holders(self, pool: str, name: str) -> dict[str, Any]:
        """Who has an image's exclusive lock, and who watches it."""
        import rbd

        with self.pool(pool) as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
            lockers = image.list_lockers() or {"lockers": []}
            return {"lockers": lockers["lockers"], "watchers": list(image.watchers_list())}

    @contextlib.contextmanager
    def pool(self, name: str, namespace: str = "") -> Iterator[Any]:
        """A pool as rados.Ioctx, opened by the administrator."""
        ioctx = self._admin.open_ioctx(name)
        try:
            ioctx.set_namespace(namespace)
            yield ioctx
        finally:
            ioctx.close()

    def rbd(self, *arguments: str, user: str = "admin") -> str:
        """Run the program ``rbd``; returns what it prints.

        :raises RuntimeError: it failed.
        """
        return _run(["rbd", "--conf", self.configuration, "--id", user, *arguments])

    def command(self, prefix: str, data: bytes = b"", **arguments: Any) -> str:
        """Ask the monitor; returns its answer.

        :raises RuntimeError: it refused.
        """
        request = json.dumps({"prefix": prefix, "format": "json", **arguments})
        status, answer, message = self._admin.mon_command(request, data, timeout=_PATIENCE)
        if status:
            raise RuntimeError(f"{prefix}: {message} ({os.strerror(-status)})")
        text: str = answer.decode()
        return text

    def last_words(self) -> str:
        """The ends of the daemons' logs, for error messages."""
        words = []
        for path in sorted(self.directory.glob("*.console")):
            words.append(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}")
        return "\n".join(words)

    # How it is made

    def _write_configuration(self) -> None:
        here = self.directory
        self.configuration.write_text(f"""\
[global]
fsid = {self._fsid}
mon host = {self.monitor}
keyring = {here}/ceph.$name.keyring
run dir = {here}
admin socket =
log file =
log to stderr = true
err to stderr = true
public addr = {self._address}
cluster addr = {self._address}
ms bind msgr1 = false
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0

[mon]
mon data = {here}/mon
mon data avail crit = 1
mon allow pool size one = true
mon cluster log to file = false
# A lone monitor has nobody to wait for
paxos propose interval = 0.05
paxos min wait = 0.01

[osd]
osd data = {here}/osd
osd objectstore = bluestore
bluestore block create = true
bluestore block size = {_STORE_BYTES}
osd memory target = 939524096

[mgr]
mgr data = {here}/mgr
mgr disabled modules = {",".join(_IDLE_MODULES)}
""")

    def _make_monitor(self) -> None:
        all_of = {"mon": "allow *", "osd": "allow *"}
        monitor = self._make_keyring("mon.", {"mon": "allow *"})
        for keyring in (
            self._make_keyring("client.admin", all_of),
            self._make_keyring("osd.0", {"mon": "allow profile osd", "osd": "allow *"}),
        ):
            _run(["ceph-authtool", monitor, "--import-keyring", keyring])
        _run(["monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", f"[{self.monitor}]",
              self._monmap])  # fmt: skip
        (self.directory / "mon").mkdir()
        _run([*self._argv("mon", "a"), "--mkfs", "--monmap", self._monmap, "--keyring", monitor])

    def _make_osd(self) -> None:
        (self.directory / "osd").mkdir()
        _run([*self._argv("osd", "0"), "--mkfs", "--osd-uuid", self._osd_uuid,
              "--monmap", self._monmap])  # fmt: skip

    def _start_manager(self) -> None:
        (self.directory / "mgr").mkdir()
        capabilities = {"mon": "allow profile mgr", "osd": "allow *"}
        self.command("auth import", self._make_keyring("mgr.a", capabilities).read_bytes())
        self._start("mgr", "a")

    def _make_keyring(self, name: str, capabilities: Mapping[str, str]) -> Path:
        path = self.directory / f"ceph.{name}.keyring"
        caps = (part for kind, what in capabilities.items() for part in ("--cap", kind, what))
        _run(["ceph-authtool", "--create-keyring", path, "--gen-key", "-n", name, *caps])
        return path

    @property
    def _monmap(self) -> Path:
        return self.directory / "monmap"

    def _argv(self, kind: str, name: str) -> list[str]:
        return [f"ceph-{kind}", "--conf", str(self.configuration), "--id", name]

    def _start(self, kind: str, name: str) -> None:
        with (self.directory / f"{kind}.console").open("ab") as console:
            self._daemons[kind] = processes.spawn(
                [*self._argv(kind, name), "--foreground"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )

    def _connect_admin(self) -> None:
        import rados

        self._admin = rados.Rados(name="client.admin", conffile=str(self.configuration))
        self._admin.connect(timeout=_PATIENCE)

    def _osd_state(self) -> tuple[bool, int]:
        """Whether the OSD is up, and the map in which it last came up."""
        (osd,) = json.loads(self.command("osd dump"))["osds"]
        return bool(osd["up"]), osd["up_from"]


def _wait_stopped(pid: int) -> None:
    """Until one thread of a busy process comes to take the signal, the others go on."""
    deadline = time.monotonic() + _PATIENCE
    while any(_goes_on(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {pid} does not stop")
        time.sleep(0.01)


def _goes_on(task: Path) -> bool:
    """Whether a thread is neither stopped nor has ended."""
    try:
        return "\nState:\tT" not in (task / "status").read_text()
    except OSError:
        return False


def _run(argv: Sequence[str | Path]) -> str:
    done = subprocess.run(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout

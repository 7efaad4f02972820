# SPDX-License-Identifier: Apache-2.0
"""What tests of host services share: two services as processes, a real RabbitMQ, real relays, and
QEMUs, real ones or make-believe.
"""

import contextlib
import pwd
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.host_client import HostClient
from tests import base
from tests.lab import processes, tls_broker
from tests.lab.broker import Broker
from tests.lab.guest import Guest
from tests.lab.host_services import HostService, ServedPair, ServedRelay
from tests.lab.migrations import MigrationTestCase
from tests.lab.relays import PATIENCE, VOLUME, wait_until
from tests.unit.relay.guest import FakeGuest, received_memory

MIB = 1 << 20


class FakeMigration:
    """Both QEMUs of a pair that runs, with a small make-believe guest."""

    def __init__(
        self, pair: ServedPair, ram_pages: int = 2048, guest: FakeGuest | None = None
    ) -> None:
        self.pair = pair
        self.guest = guest or FakeGuest(1, ram_pages=ram_pages, mapped=0)
        self.stream = memoryview(self.guest.stream())
        self.recorded = bytearray()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(pair.incoming))
        self._listener.listen()
        self._recorder = threading.Thread(target=self._record, daemon=True)
        self._recorder.start()
        self._qemu = socket.socket(socket.AF_UNIX)
        self._qemu.settimeout(PATIENCE)
        self._qemu.connect(str(pair.outgoing))

    def send(self, share: float = 1.0) -> None:
        """Send that share of what is left."""
        size = int(len(self.stream) * share)
        self._qemu.sendall(self.stream[:size])
        self.stream = self.stream[size:]

    def finish(self, *relays: ServedRelay) -> None:
        """Send the rest, and wait until both relays, or these, have told that they have delivered
        it.
        """
        self.send()
        self._qemu.shutdown(socket.SHUT_WR)
        self._recorder.join(PATIENCE)
        for relay in relays or (self.pair.source, self.pair.destination):
            relay.wait("delivered")
        memory, _ = received_memory(bytes(self.recorded), self.guest.ram_pages)
        assert (memory == self.guest.memory).all(), "pages differ"

    def broken(self) -> bool:
        """Whether QEMU sees, now or soon, that its migration has failed."""
        try:
            return self._qemu.recv(1) == b""
        except OSError:
            return True

    def close(self) -> None:
        self._qemu.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._recorder.join(PATIENCE)

    def __enter__(self) -> "FakeMigration":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self) -> None:
        with contextlib.suppress(OSError):
            qemu, _ = self._listener.accept()
            with qemu:
                while data := qemu.recv(MIB):
                    self.recorded.extend(data)


class Hosts(base.TestCase):
    """Two hosts, ``one`` and ``two``, with a broker; shared by the tests of a class."""

    resources: ClassVar[contextlib.ExitStack]
    place: ClassVar[Path]
    broker: ClassVar[Broker]
    one: ClassVar[HostService]
    two: ClassVar[HostService]

    @classmethod
    def options(cls) -> dict[str, object]:
        """Of both services."""
        return {"host__max_relays": 2}

    @classmethod
    def prefix(cls) -> list[str]:
        """The command that runs both services."""
        return []

    @classmethod
    def setUpClass(cls) -> None:
        base.require(tls_broker.available())
        super().setUpClass()
        with contextlib.ExitStack() as stack:
            cls.place = stack.enter_context(processes.workspace())
            cls.broker = stack.enter_context(Broker([]))
            for name in ("one", "two"):
                service = HostService(
                    name,
                    cls.place / name,
                    cls.broker.services_url(),
                    cls.prefix(),
                    **cls.options(),
                )
                stack.callback(service.close)
                service.start()
                setattr(cls, name, service)
            cls.resources = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.resources.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addOnException(lambda *_: self.tell())

    def tell(self) -> None:
        for service in (self.one, self.two):
            sys.stderr.write(f"\n--- {service.name} ---\n{service.last_words()}\n")

    def pair(self, reverse: bool = False, **options: Any) -> ServedPair:
        """A pair of relays that are not opened yet; ended with the test."""
        hosts = (self.two, self.one) if reverse else (self.one, self.two)
        pair = ServedPair(hosts, **options)
        self.addCleanup(pair.close)
        return pair

    def fake(self, pair: ServedPair, **options: Any) -> FakeMigration:
        migration = FakeMigration(pair, **options)
        self.addCleanup(migration.close)
        return migration

    def client_of(self, service: HostService) -> HostClient:
        made = service.client()
        self.addCleanup(made.close)
        return made

    def restart(self, service: HostService, **options: object) -> None:
        """With other options until the end of the test."""
        service.configure(**{**self.options(), **options})
        service.terminate()
        self.assertEqual(0, service.wait())
        service.start()

    def assert_nobody_migrates(self, tls_names: tuple[str, str] | None = None) -> None:
        """A migration between QEMUs of an ordinary user."""
        # As the directories above the real ones are
        for path in (self.place, self.place / "one", self.place / "two"):
            path.chmod(0o711)
        pair = self.pair(tls_names=tls_names)
        pair.open_destination()
        destination = as_nobody(RECEIVER, pair.incoming)
        self.addCleanup(processes.end, destination)
        wait_until(pair.incoming.exists, "the destination's QEMU listens")
        pair.destination.wait("running")
        pair.open_source()
        pair.source.wait("running")
        stream = self.place / "stream"
        stream.write_bytes(FakeGuest(1, ram_pages=1024, mapped=0).stream())
        stream.chmod(0o644)
        source = as_nobody(SENDER, pair.outgoing, stream)
        self.addCleanup(processes.end, source)
        self.assertEqual((0, 0), (source.wait(PATIENCE), destination.wait(PATIENCE)))
        for relay in (pair.source, pair.destination):
            relay.wait("delivered")
        pair.close_sessions()
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        for service in (self.one, self.two):
            wait_until(lambda each=service: not each.left_behind(), "nothing is left")
            self.assertEqual([], service.relays())

    def assert_refused(self, code: str, ask: Callable[..., Any], *arguments: Any) -> str:
        error = self.assertRaises(exception.HostRefused, ask, *arguments)
        self.assertEqual(code, error.kwargs["code"], error)
        return str(error)


#: QEMU's part at the destination and at the source.
RECEIVER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
connection = listener.accept()[0]
while connection.recv(1 << 20):
    pass
"""
SENDER = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(open(sys.argv[2], "rb").read())
connection.shutdown(socket.SHUT_WR)
while connection.recv(1 << 20):
    pass
"""


def as_nobody(program: str, *arguments: Path) -> "subprocess.Popen[bytes]":
    """A process of an ordinary user."""
    user = pwd.getpwnam("nobody")
    owner = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return processes.spawn(
        ["setpriv", *owner, sys.executable, "-I", "-c", program, *map(str, arguments)], cwd="/"
    )


class ServedGuests(MigrationTestCase, Hosts):
    """Real QEMUs, and relays that two services run."""

    guest: ClassVar[dict[str, Any]] = {"ram_mb": 160, "fill_mb": 64, "mapped": 90}

    @contextlib.contextmanager
    def served(
        self, capabilities: Sequence[str] = (), **options: Any
    ) -> Iterator[tuple[ServedPair, Guest]]:
        """A pair with the guest's own map, and the QEMU that it will move to.

        :param capabilities: of that QEMU.
        """
        with contextlib.ExitStack() as stack:
            pair = self.pair(volumes={VOLUME: self.spec.disk}, saved=self.map_of(), **options)
            destination = stack.enter_context(Guest.start_destination(self.spec))
            destination.set_capabilities(*capabilities)
            pair.open_destination()
            destination.listen(pair.incoming)
            pair.destination.wait("running")
            pair.open_source()
            pair.source.wait("running")
            yield pair, destination


class Agent:
    """What answers at a port."""

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        return messages.Pong("1", messages.VERSION, "the-agent")


def ended(pid: int) -> bool:
    """Whether a process has ended; nobody may have noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def record_of(pair: ServedPair) -> dict[str, Any]:
    """What the source's host has on disk of it."""
    (record,) = [
        each
        for each in pair.source.service.records()
        if each["session_id"] == pair.order.session_id
    ]
    return record

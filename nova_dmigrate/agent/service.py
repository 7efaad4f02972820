# SPDX-License-Identifier: Apache-2.0
"""The agent as a service: its methods, and what happens once a second."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from nova_dmigrate import exception, version
from nova_dmigrate.agent import database, describe, ledger, mapper, maps, options, processes
from nova_dmigrate.agent.follow_up import FollowUp
from nova_dmigrate.agent.hot_pages import HotPages, HotPagesSettings
from nova_dmigrate.agent.preparation import Preparation, PreparationSettings
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.dispatcher import Dispatcher

LOG = logging.getLogger(__name__)

_TICK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class AgentSettings:
    """``selector``: which servers. ``login``: the SQL user; its socket is that of each server.

    ``state_directory``: for the ledger of changed settings, and for maps.
    """

    state_directory: Path
    selector: processes.Selector = processes.Selector()
    login: database.Login = database.Login("")
    preparation: PreparationSettings = PreparationSettings()
    mapping: options.MapOptions = options.MapOptions()
    hot_pages: HotPagesSettings = HotPagesSettings()


class Servers:
    """The database servers of this guest, found anew whenever somebody asks."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings

    def find(self) -> Sequence[processes.ServerProcess]:
        return processes.find_servers(self._settings.selector)

    def login(self, server: processes.ServerProcess) -> database.Login | None:
        """How to reach a server, None if it listens on no socket.

        :raises ServerError: if there is no way to its socket.
        """
        socket = server.socket_path
        if socket is None:
            return None
        return dataclasses.replace(
            self._settings.login, socket=socket, uids=frozenset((server.uid,))
        )

    def login_at(self, socket: str) -> database.Login:
        """How to reach the server at a socket, whether it can be found now or not."""
        uids = processes.user_ids(self._settings.selector.users)
        return dataclasses.replace(self._settings.login, socket=socket, uids=uids)

    def logins(self) -> list[database.Login]:
        """How to reach each of them; those that cannot be reached are left out.

        :raises ServerError: if that leaves none of those that listen on a socket.
        """
        logins, failures = [], []
        for server in self.find():
            try:
                login = self.login(server)
            except exception.ServerError as error:
                LOG.warning("Left out: %s", error)
                failures.append(error)
                continue
            if login is not None:
                logins.append(login)
        if failures and not logins:
            raise failures[0]
        return logins

    def build_map(self) -> maps.GuestMap:
        """One map of all of them."""
        return maps.GuestMap(
            [mapper.ServerMap(server, self._settings.mapping) for server in self.find()]
        )


def make_preparation(settings: AgentSettings) -> Preparation:
    """The preparation whose ledger is in the state directory."""
    servers = Servers(settings)
    return Preparation(
        ledger.LedgerFile(settings.state_directory / "preparation.json"),
        servers.logins,
        servers.login_at,
        database.connect,
        settings.preparation,
    )


def make_hot_pages(settings: AgentSettings, busy: Callable[[], bool] = lambda: False) -> HotPages:
    """What keeps the lists of hot pages, and fills buffer pools from them."""
    return HotPages(
        settings.state_directory,
        Servers(settings),
        database.connect,
        settings.hot_pages,
        settings.mapping,
        busy,
    )


class AgentService:
    """The methods of `rpc.messages`, and the state behind them."""

    def __init__(
        self, settings: AgentSettings, on_move: Callable[[str], None] = lambda sign: None
    ) -> None:
        self._servers = Servers(settings)
        self.preparation = make_preparation(settings)
        self.hot_pages = make_hot_pages(settings, lambda: self.preparation.active)
        self._maps = maps.MapStore(self._servers.build_map, settings.state_directory)
        self.follow_up = FollowUp(on_move)
        self._incarnation = uuid.uuid4().hex

    def tick(self) -> None:
        """What has to be looked after. An error here must not end the agent."""
        for each in (self.preparation.tick, self._maps.tick):
            try:
                each()
            except Exception:  # noqa: BLE001
                LOG.exception("Trouble in what the agent does every second")

    # Methods of the protocol

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        return messages.Pong(version.version_string(), messages.VERSION, self._incarnation)

    def describe(self, arguments: messages.Nothing) -> messages.Description:
        made = describe.inspect(self._servers.find, self._servers.login)
        found = (*self.preparation.findings(), *self.hot_pages.findings(), *made.findings)
        return dataclasses.replace(made, findings=found).to_message()

    def health(self, arguments: messages.Nothing) -> messages.Health:
        try:
            logins = self._servers.logins()
        except (exception.AgentError, OSError) as error:
            gone = messages.ServerHealth("database", False, str(error)[:1000], None, None, None)
            servers: tuple[messages.ServerHealth, ...] = (gone,)
        else:
            servers = tuple(describe.inspect_health(each) for each in logins)
        return messages.Health(
            incarnation=self._incarnation,
            moves=self.follow_up.moves,
            since_move=self.follow_up.since_move,
            servers=servers[: messages.MAX_SERVERS],
        )

    def prepare(self, arguments: messages.PrepareArguments) -> messages.LeaseState:
        with self.hot_pages.held_off():
            return self.preparation.prepare(arguments)

    def renew(self, arguments: messages.RenewArguments) -> messages.LeaseState:
        return self.preparation.renew(arguments.lease_id, arguments.lease_seconds)

    def restore(self, arguments: messages.LeaseArguments) -> messages.LeaseState:
        return self.preparation.restore(arguments.lease_id)

    def map_begin(self, arguments: messages.MapArguments) -> messages.MapState:
        return self._maps.begin(arguments.max_chunk_bytes)

    def map_state(self, arguments: messages.MapReference) -> messages.MapState:
        return self._maps.state(arguments.map_id)

    def map_chunk(self, arguments: messages.ChunkArguments) -> messages.Chunk:
        return self._maps.chunk(arguments.map_id, arguments.index)

    def map_end(self, arguments: messages.MapReference) -> messages.Done:
        return self._maps.end(arguments.map_id)

    def warm_up(self, arguments: messages.Nothing) -> messages.WarmUpState:
        return self.hot_pages.warm_up()

    def warm_up_state(self, arguments: messages.Nothing) -> messages.WarmUpState:
        return self.hot_pages.warm_up_state()


class RequestServer(Protocol):
    """What `rpc.broker.BrokerServer` and `rpc.channel.ChannelServer` have in common."""

    def start(self) -> None: ...

    def reconnect(self) -> None: ...

    def stop(self) -> None: ...


def run(
    settings: AgentSettings,
    make_server: Callable[[Dispatcher], RequestServer],
    stopped: threading.Event,
) -> None:
    """Serve until ``stopped`` is set; all settings are restored before this returns.

    :raises AgentError: if an agent already runs in this guest.
    """
    with exclusive(settings.state_directory):
        service = AgentService(settings, on_move=lambda sign: server.reconnect())
        server = make_server(Dispatcher(service, messages.AGENT))
        service.preparation.recover()
        service.tick()
        with contextlib.ExitStack() as stack:
            # Backwards, each whatever becomes of the others. Settings are restored last: what a
            # request that came before the end still changes is put back, a later one is refused
            stack.callback(service.preparation.close)
            stack.callback(service.hot_pages.stop)
            stack.callback(server.stop)
            stack.callback(service.follow_up.stop)
            service.hot_pages.start()
            service.follow_up.start()
            server.start()
            while not stopped.wait(_TICK_SECONDS):
                service.tick()


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the state directory against a second agent.

    :raises AgentError: with code ``running`` if another one holds it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise exception.AgentError(
                reason=f"another one is running (it holds {directory})", code="running"
            ) from error
        yield
    finally:
        os.close(descriptor)

# SPDX-License-Identifier: Apache-2.0
"""The thread that keeps the lists of hot pages, and fills buffer pools from them after a restart.

It does one thing at a time: both use the same settings of a server and the same file beside its
list, and a list is not made of a pool that is being filled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    changes,
    hotlist_keeper,
    hotlist_server,
    ledger,
    options,
    warm_up,
)
from nova_dmigrate.findings import Finding
from nova_dmigrate.rpc import messages

LOG = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_STOP_PATIENCE = 30.0
_REQUEST = "warm-up.request"


@dataclasses.dataclass(frozen=True)
class HotPagesSettings:
    """``warm_up_rate``: bytes that a server loads in a second at most."""

    lists: hotlist_keeper.ListSettings = hotlist_keeper.ListSettings()
    warm_up_rate: int = 100 << 20


class HotPages:
    """For several threads.

    :param directory: for what is noted on disk.
    :param busy: whether settings of servers are changed for a migration; meanwhile nothing is done.
    """

    def __init__(
        self,
        directory: Path,
        servers: hotlist_keeper.Servers,
        connect: changes.Connect,
        settings: HotPagesSettings,
        mapping: options.MapOptions,
        busy: Callable[[], bool],
    ) -> None:
        self._request = directory / _REQUEST
        self._busy = busy
        self._borrowed = changes.Borrowed(
            ledger.LedgerFile(directory / "hot-pages.json"),
            hotlist_server.NAMES,
            servers.login_at,
            connect,
        )
        self._keeper = hotlist_keeper.Keeper(
            servers, connect, self._borrowed, settings.lists, mapping
        )
        self._warm_up = warm_up.WarmUp(
            directory / "warm-up.json", servers, connect, self._borrowed, settings.warm_up_rate
        )
        self._stopped = threading.Event()
        self._woken = threading.Event()
        # Held while something is done in a server
        self._working = threading.Lock()
        self._holders = 0
        self._cancelled = cancellation.Cancellation()
        self._thread = threading.Thread(target=self._run, name="hot-pages", daemon=True)

    def start(self) -> None:
        """Put back what an agent that was killed has left, and go on with what it has begun."""
        self.recover()
        self._warm_up.recover()
        self._thread.start()

    def recover(self) -> str | None:
        """Put back what an agent that was killed has left; why not all, else None."""
        self._borrowed.recover()
        return self._borrowed.put_back()

    def stop(self) -> None:
        """End, with all settings put back. What is not finished is left to the next agent."""
        self._stopped.set()
        self._woken.set()
        self._cancelled.cancel()
        if self._thread.ident is not None:
            self._thread.join(_STOP_PATIENCE)
        self._borrowed.put_back()

    def warm_up(self) -> messages.WarmUpState:
        """Begin to fill the buffer pools; returns at once."""
        state = self._warm_up.request()
        self._woken.set()
        return state

    def warm_up_state(self) -> messages.WarmUpState:
        return self._warm_up.state

    def findings(self) -> list[Finding]:
        """What the operator has to put right by hand."""
        return self._borrowed.findings()

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """Within, nothing is done in a server; what was under way is given up before.

        For a migration: it needs the settings of the servers, and a guest that is about to move
        has no use for a half-filled pool.
        """
        self._holders += 1
        try:
            self._cancelled.cancel()
            with self._working:
                self._warm_up.stop("migration", "a migration came in between")
                yield
        finally:
            self._holders -= 1

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._woken.clear()
            try:
                self._take_request()
                with self._working:
                    # New before anybody is looked for who wants us to end: that one cancels it
                    self._cancelled = cancellation.Cancellation("this work")
                    if not (self._stopped.is_set() or self._holders or self._busy()):
                        self._work()
            except Exception:  # noqa: BLE001 - the agent goes on
                LOG.exception("Trouble with the hot pages")
            self._woken.wait(_TICK_SECONDS)

    def _work(self) -> None:
        reason = self._borrowed.put_back()
        if reason is not None:
            LOG.debug("Settings cannot be restored yet: %s", reason)
            return
        try:
            if self._warm_up.wanted:
                self._warm_up.run(self._cancelled)
            else:
                self._keeper.keep(self._cancelled)
        except exception.AgentError as error:
            LOG.info("Hot pages: %s", error)

    def _take_request(self) -> None:
        """What the command line has asked for while this agent runs."""
        with contextlib.suppress(FileNotFoundError):
            self._request.stat()
            self._warm_up.request()
            self._request.unlink()


def ask_running_agent(directory: Path) -> None:
    """Leave a request to warm up for the agent that holds the state directory."""
    (directory / _REQUEST).touch(mode=0o600)


def running_agents_state(directory: Path) -> messages.WarmUpState | None:
    """How far that agent is; None as long as it has not taken the request.

    :raises OSError: if it has noted nothing.
    """
    if (directory / _REQUEST).exists():
        return None
    return ledger.read_record(warm_up.Record, directory / "warm-up.json").state

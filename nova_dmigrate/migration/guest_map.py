# SPDX-License-Identifier: Apache-2.0
"""The buffer map of the guest that is migrated: fetched in a thread, while all the rest begins.

The agent may need a while in a guest that is busy. Nothing has to wait for it: the stream begins
without a map, and what has not been sent when it comes is referenced from there on.
"""

import logging
import threading
import time
from pathlib import Path
from types import TracebackType

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE, MapLimits
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.prepared_database import PreparedDatabase
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.rpc.client import AgentClient

LOG = logging.getLogger(__name__)


class GuestMapFetch:
    """One request for the map, from `start` to the end of this context.

    :param memory: bytes of the guest's memory.
    :param path: where the map is put for the source relay.
    """

    def __init__(
        self,
        agent: AgentClient,
        database: PreparedDatabase,
        settings: OrchestrationSettings,
        limits: MapLimits,
        memory: int,
        path: Path,
    ) -> None:
        self._agent = agent
        self._database = database
        self._settings = settings
        self._limits = limits
        self._memory = memory
        self._path = path
        self._needless = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guest-map", daemon=True)
        #: Why there is none, once that is known.
        self.failure: exception.FallBack | None = None
        #: Whether it was abandoned before it was there.
        self.late = False
        #: What the agent has found on the way.
        self.findings: tuple[Finding, ...] = ()
        #: Seconds from the request to the map, its preparation included; None as long as there is
        #: none.
        self.seconds: float | None = None

    def __enter__(self) -> "GuestMapFetch":
        return self

    def start(self) -> None:
        """Ask for it, once."""
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # It ends with the answer that it waits for, for which there is a time limit
        self.abandon()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether the map is in its file."""
        return self.seconds is not None

    def abandon(self) -> None:
        """It would come too late."""
        self._needless.set()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it is there, or known that it will not be."""
        return self._done.wait(seconds)

    def check(self) -> None:
        """Go on, unless it is known by now that there will be no map.

        :raises FallBack: it is.
        """
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._fetch()
            self.late = self._needless.is_set()
            self.seconds = time.monotonic() - began
        except exception.FallBack as reason:
            late = self._needless.is_set()
            LOG.info("%s", reason)
            self.failure = because(Reason.LATE_MAP, self._agent.instance) if late else reason
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it
            LOG.exception("The buffer map cannot be had")
            self.failure = because(Reason.AGENT_REFUSED, self._agent.instance, error=error)
        finally:
            self._done.set()

    def _fetch(self) -> None:
        settings, instance = self._settings, self._agent.instance
        try:
            if settings.prepare_time:
                self._database.prepare(settings.dirty_share, settings.prepare_time, self._needless)
                self._database.keep()
            state = self._agent.save_map(
                self._path, self._limits, wanted=lambda: not self._needless.is_set()
            )
            self.findings = tuple(
                Finding(each.code, Severity(each.severity), each.message) for each in state.findings
            )
            # What the agent says: the source relay counts what the map really has
            share = state.pages * PAGE_SIZE / self._memory
            if share < settings.min_mapped_share:
                raise because(Reason.SMALL_MAP, instance, share=share)
        except exception.AgentUnreachable as error:
            raise because(Reason.AGENT_UNREACHABLE, instance, error=error) from error
        except exception.AgentRefused as error:
            raise because(Reason.AGENT_REFUSED, instance, error=error) from error
        except exception.BufferMapError as error:
            raise because(Reason.BAD_MAP, instance, error=error) from error
        except OSError as error:
            raise because(Reason.NO_STATE, instance, error=error) from error

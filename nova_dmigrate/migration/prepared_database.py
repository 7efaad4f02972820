# SPDX-License-Identifier: Apache-2.0
"""The guest's database while it is prepared for a migration: asked, held by a lease, restored."""

import logging
import threading
import time

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.client import AgentClient

LOG = logging.getLogger(__name__)

_POLL = 0.5  # seconds
_AGAIN = 2.0  # seconds after which a lease is renewed again that was not


class PreparedDatabase:
    """The lease that one migration holds on the settings of a guest's servers.

    :param lease: seconds after which the agent restores by itself if nobody renews.
    """

    def __init__(self, agent: AgentClient, lease: float) -> None:
        self._agent = agent
        self._lease = lease
        self._lease_id: str | None = None
        self._stopped = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether something may have to be restored."""
        return self._lease_id is not None

    def prepare(
        self, dirty_share: float, seconds: float, cancelled: threading.Event
    ) -> messages.LeaseState:
        """Have dirty pages written, for so many seconds at most, or until ``cancelled`` is set; how
        far that came.

        :raises AgentUnreachable: the agent does not answer.
        :raises AgentRefused: it cannot prepare.
        """
        state = self._agent.prepare(dirty_share, max(1.0, seconds), self._lease)
        self._lease_id = state.lease_id
        end = time.monotonic() + seconds
        while state.state == "flushing" and time.monotonic() < end:
            if cancelled.wait(_POLL):
                break
            state = self._agent.renew(state.lease_id, self._lease)
        LOG.info(
            "Instance %s: %.1f%% of the buffer pool is dirty when its map is made (%s)",
            self._agent.instance,
            100 * state.dirty_share,
            state.message,
        )
        return state

    def keep(self) -> None:
        """Renew the lease from now on, in a thread: an agent that is slow must not slow down who
        looks after the migration."""
        if self._lease_id is not None:
            self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        pause = self._lease / 3
        while not self._stopped.wait(pause):
            if self._lease_id is None:
                return
            pause = self._lease / 3
            try:
                self._agent.renew(self._lease_id, self._lease)
            except exception.RpcError as error:
                if isinstance(error, exception.AgentUnreachable):
                    # An outage may be over in a moment, and the lease soon
                    pause = min(pause, _AGAIN)
                # The guest may just be moving: it is asked again
                if not self._stopped.is_set():
                    LOG.info("The lease is not renewed: %s", error)

    def let_go(self) -> None:
        """Renew the lease no more: the agent is not where it was. What is left of the lease is the
        time for `restore`."""
        self._stopped.set()

    def restore(self, agent: AgentClient | None = None) -> bool:
        """Have all settings restored; whether the agent says that they are.

        :param agent: the way to the agent where the guest runs now, if it has moved.
        """
        self.let_go()
        if self._keeper is not None:
            self._keeper.join(self._lease)
        if self._lease_id is None:
            return True
        client = agent or self._agent
        try:
            state = client.restore(self._lease_id)
        except exception.RpcError as error:
            LOG.warning("%s; its settings are restored when the lease ends", error)
            return False
        self._lease_id = None
        return state.state == "idle"

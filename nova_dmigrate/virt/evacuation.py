# SPDX-License-Identifier: Apache-2.0
"""Servers that come from a host that has failed: their agents are asked to fill the databases'
buffer pools again, hottest pages first.

Nova is not kept waiting. Each server has a thread that asks until the agent, which starts with its
guest, has taken it, and then how far that is.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Domain
from nova_dmigrate.migration.peers import open_peers, settings_from
from nova_dmigrate.migration.request import AgentTransport
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.rpc.messages import WARM_UP_UNFINISHED
from nova_dmigrate.virt.conditions import request_for
from nova_dmigrate.virt.policy import Policy

LOG = logging.getLogger(__name__)

#: Seconds within which a guest must have started its agent, or answer again; and between two
#: questions.
PATIENCE = 1800.0
_INTERVAL = 5.0
_NOT_WARMED = "Instance %s is not warmed up: %s"
_WARM = (
    logging.INFO,
    "Instance %(instance)s is warm after %(seconds).0f s: %(loaded)d of %(total)d hot pages"
    " %(message)s",
)
_NOT_WARM = (
    logging.WARNING,
    "Instance %(instance)s is not warm: %(state)s with %(loaded)d of %(total)d hot pages,"
    " %(code)s: %(message)s",
)


class _NoWay(Exception):
    """The configuration has no way to agents: to ask again is of no use."""


class Evacuations:
    """The servers of this host that have come so, until they are warm.

    :param configuration: loads nova-dmigrate's own; may raise ConfigurationError.
    :param patience, interval: seconds; see above.
    """

    def __init__(
        self,
        configuration: Callable[[], cfg.ConfigOpts],
        patience: float = PATIENCE,
        interval: float = _INTERVAL,
    ) -> None:
        self._configuration = configuration
        self._patience = patience
        self._interval = interval
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        #: By UUID the moment up to which the agent is waited for.
        self._waiting: dict[str, float] = {}
        self._cold: set[str] = set()

    def arrived(self, instance: str, host: str, facts: Callable[[], Domain]) -> None:
        """A server is started here in place of one that was lost, or will be when it is powered on.

        :param instance: UUID; :param host: this host's name.
        :param facts: describes its domain; raises as long as there is none.
        """
        with self._lock:
            self._cold.add(instance)
        self.powered_on(instance, host, facts)

    def powered_on(self, instance: str, host: str, facts: Callable[[], Domain]) -> None:
        """A server is started; if it is one of those, its agent is waited for (again)."""
        with self._lock:
            if instance not in self._cold:
                return
            known = instance in self._waiting
            self._waiting[instance] = time.monotonic() + self._patience
        if not known:
            threading.Thread(
                target=self._run,
                args=(instance, host, facts),
                name=f"warm-up-{instance}",
                daemon=True,
            ).start()

    def stop(self) -> None:
        """Wait for nobody any more."""
        self._stopped.set()

    def _run(self, instance: str, host: str, facts: Callable[[], Domain]) -> None:
        last = "there was no time for it"
        while self._wanted(instance):
            try:
                with self._agent(instance, host, facts()) as agent:
                    agent.warm_up()
                self._forget(instance)
            except (_NoWay, exception.AgentRefused) as error:
                LOG.warning(_NOT_WARMED, instance, error)
                self._forget(instance)
                return
            except Exception as error:  # noqa: BLE001 - no domain yet, no agent yet, no broker
                last = f"{type(error).__name__}: {error}"
            else:
                LOG.info("Instance %s has come from another host; its agent warms it up", instance)
                self._follow(instance, host, facts)
                return
            if self._stopped.wait(self._interval):
                return
        LOG.warning(_NOT_WARMED, instance, last)

    def _follow(self, instance: str, host: str, facts: Callable[[], Domain]) -> None:
        """Tell how the agent's warm-up ends. It needs nobody for that."""
        last, end = "", time.monotonic() + self._patience
        while time.monotonic() < end:
            if self._stopped.wait(self._interval):
                return
            try:
                with self._agent(instance, host, facts()) as agent:
                    state = agent.warm_up_progress()
            except Exception as error:  # noqa: BLE001 - as above, or it has moved on
                last = f"{type(error).__name__}: {error}"
                continue
            if state["state"] not in WARM_UP_UNFINISHED:
                told = _WARM if state["state"] == "done" else _NOT_WARM
                LOG.log(*told, {"instance": instance, **state})
                return
            end = time.monotonic() + self._patience
        LOG.warning("Instance %s: whether it is warm is not known: %s", instance, last)

    def _wanted(self, instance: str) -> bool:
        """Whether the agent is still waited for; else it may be so again later."""
        with self._lock:
            if time.monotonic() < self._waiting[instance]:
                return True
            del self._waiting[instance]
            return False

    @contextlib.contextmanager
    def _agent(self, instance: str, host: str, domain: Domain) -> Iterator[AgentClient]:
        config = self._configuration()
        settings = settings_from(config)
        request = request_for(domain, Policy.PREFERRED, config, host)
        if request.agent_transport is AgentTransport.NONE:
            raise _NoWay("there is no way to its agent")
        with open_peers(request, config, settings, instance, domain.channel) as peers:
            with peers.agent(peers.source) as agent:
                yield agent

    def _forget(self, instance: str) -> None:
        with self._lock:
            self._cold.discard(instance)
            self._waiting.pop(instance, None)

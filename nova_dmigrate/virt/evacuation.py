# SPDX-License-Identifier: Apache-2.0
"""Servers that come from a host that has failed: their agents are asked to fill the databases'
buffer pools again, hottest pages first.

Nova is not kept waiting. Each server has a thread that asks until the agent, which starts with its
guest, has taken it.
"""

import logging
import threading
import time
from collections.abc import Callable

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Domain
from nova_dmigrate.migration.peers import open_peers, settings_from
from nova_dmigrate.migration.request import AgentTransport
from nova_dmigrate.virt.conditions import request_for
from nova_dmigrate.virt.policy import Policy

LOG = logging.getLogger(__name__)

#: Seconds within which a guest must have started its agent, and between two questions.
PATIENCE = 1800.0
_INTERVAL = 5.0


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

    def _run(self, instance: str, host: str, facts: Callable[[], Domain]) -> None:
        last = "there was no time for it"
        while self._wanted(instance):
            try:
                self._ask(instance, host, facts())
                self._forget(instance)
                return
            except exception.AgentRefused as error:
                LOG.warning("Instance %s is not warmed up: %s", instance, error)
                self._forget(instance)
                return
            except Exception as error:  # noqa: BLE001 - no domain yet, no agent yet, no broker
                last = f"{type(error).__name__}: {error}"
            time.sleep(self._interval)
        LOG.warning("Instance %s is not warmed up: %s", instance, last)

    def _wanted(self, instance: str) -> bool:
        """Whether the agent is still waited for; else it may be so again later."""
        with self._lock:
            if time.monotonic() < self._waiting[instance]:
                return True
            del self._waiting[instance]
            return False

    def _ask(self, instance: str, host: str, domain: Domain) -> None:
        """Have one agent begin."""
        config = self._configuration()
        settings = settings_from(config)
        request = request_for(domain, Policy.PREFERRED, config, host)
        if request.agent_transport is AgentTransport.NONE:
            LOG.info("Instance %s is not warmed up: there is no way to its agent", instance)
            return
        with open_peers(request, config, settings, instance, domain.channel) as peers:
            with peers.agent(peers.source) as agent:
                agent.warm_up()
        LOG.info("Instance %s has come from another host, and is warmed up", instance)

    def _forget(self, instance: str) -> None:
        with self._lock:
            self._cold.discard(instance)
            self._waiting.pop(instance, None)

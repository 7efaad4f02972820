# SPDX-License-Identifier: Apache-2.0
"""The host of a database server dies, and Nova evacuates the server."""

import dataclasses
import time

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages
from tests.lab.openstack.client import CloudError
from tests.lab.openstack.computes import Compute
from tests.lab.openstack.deeds import Done
from tests.lab.openstack.scene import Scene
from tests.lab.openstack.working import DMIGRATE

#: Versions of Nova's API: since the latter servers are stopped when they have come.
STARTS, STOPS = "2.90", "2.95"


@dataclasses.dataclass(frozen=True)
class Evacuated:
    """The host dies at once with all that runs on it, Nova is told, the server is evacuated, and
    the host comes back.

    :ivar version: of Nova's API; from `STOPS` on the server has to be started.
    """

    version: str

    def __str__(self) -> str:
        started = "is started and " if self.version == STOPS else ""
        return f"the server {started}runs on the other host, and its agent has filled the pool"

    def __call__(self, scene: Scene) -> Done:
        scene.working.choose(DMIGRATE)
        source, destination = scene.here, scene.there
        told = f"Instance {scene.server.id} has come from another host; its agent warms it up"
        known = destination.said(told)
        began = time.monotonic()
        source.die()
        try:
            self._evacuate(scene, source, destination)
            ran = time.monotonic() - began
            scene.working.outlive()
            served = time.monotonic() - began
            client = scene.cloud.client
            client.wait(lambda: destination.said(told) > known, "the agent is told to warm up")
            warm = self._warm_up(scene)
        finally:
            source.ensure_running()
        scene.cloud.client.bring_up(source.name)
        was = f"ran after {ran:.0f} s, committed after {served:.0f} s; warm-up: {warm}"
        return Done(was, [] if warm.startswith("done") else [f"the warm-up is {warm}"])

    def _evacuate(self, scene: Scene, source: Compute, destination: Compute) -> None:
        client, server = scene.cloud.client, scene.server
        client.force_down(source.name)
        client.evacuate(server, self.version)
        arrived = "SHUTOFF" if self.version == STOPS else "ACTIVE"

        def is_there() -> bool:
            now = client.sdk.compute.get_server(server.id)
            if now.status == "ERROR":
                raise CloudError(f"the evacuation has failed: {now.fault}")
            return now.compute_host == destination.name and not now.task_state

        client.wait(is_there, f"{server.name} is on {destination.name}")
        client.wait_for_server(server, arrived)
        if self.version == STOPS:
            client.sdk.compute.start_server(server.id)
            client.wait_for_server(server, "ACTIVE")

    @staticmethod
    def _warm_up(scene: Scene) -> str:
        """How the agent's warm-up has ended, in words."""
        progress: dict[str, object] = {}

        def over() -> bool:
            try:
                with scene.working.database.account.agent() as agent:
                    progress.update(agent.warm_up_progress())
            except exception.AgentUnreachable:
                return False
            return progress["state"] not in messages.WARM_UP_UNFINISHED

        scene.cloud.client.wait(over, "the agent has filled the pool")
        return "{state}, {loaded} of {total} pages {message}".format(**progress).rstrip()

# SPDX-License-Identifier: Apache-2.0
"""What the source host's configuration says about the orchestration, in plain units."""

import dataclasses
from pathlib import Path

from nova_dmigrate.buffermap import MapLimits


@dataclasses.dataclass(frozen=True)
class OrchestrationSettings:
    """Seconds, bytes, shares of 1, milliseconds; see ``[migration]`` of the configuration.

    :ivar stall_timeout: the relays' own.
    :ivar state_directory: where buffer map and memory layout are put for the source relay.
    :ivar map_limits: what a buffer map may be at most.
    """

    state_directory: Path
    agent_timeout: float = 5.0
    prepare_time: float = 0.0
    dirty_share: float = 0.01
    map_time: float = 120.0
    min_mapped_share: float = 0.05
    host_timeout: float = 2.0
    queue_time: float = 60.0
    lease: float = 30.0
    stall_timeout: float = 30.0
    max_downtime_ms: int = 0
    retry_ordinary: bool = True
    map_limits: MapLimits = dataclasses.field(default_factory=MapLimits)

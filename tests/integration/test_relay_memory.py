# SPDX-License-Identifier: Apache-2.0
"""What a host reckons for a relay's memory is what it takes at most."""

from pathlib import Path

import numpy as np
from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap, VolumeExtents
from nova_dmigrate.cmd import host
from nova_dmigrate.host.capacity import Limits, Load
from tests.integration import host_base
from tests.lab.relays import VOLUME, SavedMap, wait_until
from tests.unit.relay.pair import MTREE
from tests.unit.stream.builder import StreamBuilder

MIB = 1 << 20
#: Of a guest of 4 GiB, nearly all of which is on a volume, no page beside its neighbours.
PAGES = 1 << 20
FIRST = 256
RELAY = {"window_size": 16, "read_ahead": 4}


class MemoryTest(host_base.Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {f"relay__{name}": value for name, value in RELAY.items()}

    def test_relays_with_a_large_map_take_no_more_than_was_reckoned(self) -> None:
        limits = reckoned()
        memory = PAGES * PAGE_SIZE
        pair = self.pair(saved=large_map(self.place), guest_memory=memory).open()
        relays = (
            ("source", self.one.relays(), 15 * PAGES),
            ("destination", self.two.relays(), 20 * PAGES),
        )
        migration = self.fake(pair)
        stream = StreamBuilder([("pc.ram", memory)]).begin()
        migration.stream = memoryview(
            stream.part().zeros(0, np.arange(FIRST) * PAGE_SIZE).finish().data()
        )
        migration.send()
        progress = wait_until(
            lambda: (told := pair.source.progress()) and told["map"] == "taken" and told,
            "the map is in use",
        )
        self.assertGreater(progress["mapped_pages"], 0.9 * PAGES)
        for role, (pid,), least in relays:
            peak = peak_of(pid)
            self.assertLess(peak, limits.needs(Load(role, memory)), role)
            # Else the figures would be larger than they need to be
            self.assertGreater(peak, least, role)

    def test_a_guest_for_which_there_is_never_room_is_refused(self) -> None:
        self.restart(self.two, host__memory_limit=512)
        self.addCleanup(self.restart, self.two)
        pair = self.pair(guest_memory=1 << 30)
        pair.open_destination()
        pair.destination.wait("running")
        large = self.pair(guest_memory=64 << 30)
        text = self.assert_refused("no-memory", large.open_destination)
        self.assertIn("MiB of memory", text)


def reckoned() -> Limits:
    """Of a host with the services' options."""
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    config([], project="nova-dmigrate", default_config_files=[], default_config_dirs=[])
    for name, value in RELAY.items():
        config.set_override(name, value, "relay")
    return host.limits_from(config)


def large_map(directory: Path) -> SavedMap:
    """Pages that lie on blocks in no order at all."""
    random = np.random.default_rng(1)
    gpa = np.arange(FIRST, PAGES, dtype=np.uint64) * PAGE_SIZE
    blocks = random.permutation(len(gpa)).astype(np.uint64) * PAGE_SIZE
    size = len(gpa) * PAGE_SIZE
    saved = SavedMap(directory / "large.map", directory / "large.mtree")
    BufferMap.build(
        [VolumeExtents(VOLUME, size, gpa, blocks, np.full(len(gpa), PAGE_SIZE, np.uint64))]
    ).save(saved.buffer_map)
    saved.memory_layout.write_text(MTREE.format(end=PAGES * PAGE_SIZE - 1))
    return saved


def peak_of(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"process {pid} is gone")

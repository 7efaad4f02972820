# SPDX-License-Identifier: Apache-2.0
"""Real guests, migrated through two relays, arrive to the last bit, whatever the map says.

Each migration is compared page by page (``assert_delivered``); nothing here depends on who is
faster, the network, the volume or the guest.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from testtools.content import text_content

from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap, VolumeExtents, VolumeMap
from tests.lab import migrations, relays
from tests.lab.relays import VOLUME, SavedMap
from tests.unit.relay.wire.certificates import Authority

MIB = 1 << 20
#: So that all mapped pages become references, however fast the volume is.
ALL_REFERENCES: dict[str, Any] = {"relay__hold_pages": 0, "relay__hurry_threshold": 60000}


def chosen(extents: VolumeExtents, which: NDArray[Any], offsets: Any = None) -> VolumeExtents:
    """Some pages of a map, optionally with other offsets."""
    return VolumeExtents(
        extents.volume_id,
        extents.size,
        extents.guest[which],
        (extents.volume_offset if offsets is None else offsets)[which],
        extents.length[which],
    )


def random_blocks(random: np.random.Generator, extents: VolumeExtents) -> NDArray[np.uint64]:
    """An offset on the volume for each page, none of which has anything to do with the page."""
    blocks = random.integers(0, extents.size // PAGE_SIZE, len(extents.guest), np.uint64)
    return blocks * np.uint64(PAGE_SIZE)


def rewrite_blocks(path: Path, blocks: NDArray[np.uint64]) -> None:
    """Change each byte of these blocks of a disk."""
    disk = np.memmap(path, np.uint8, "r+").reshape(-1, PAGE_SIZE)
    disk[blocks.astype(np.int64)] ^= 0xFF
    disk.flush()


class TestMaps(migrations.MigrationTestCase):
    """Maps of a quiet guest: right ones, and such as a guest may have in good faith."""

    def setUp(self) -> None:
        super().setUp()
        self.extents = relays.extents(self.source)
        self.right = migrations.copies(self.source, self.extents)
        # The guest is new, so its map is: what follows is not about nothing.
        self.assertGreater(np.count_nonzero(self.right), 0.8 * 96 * 256)

    def migrate(self, saved: SavedMap | None, **options: Any) -> dict[str, Any]:
        with self.migration(saved=saved, **options) as migration:
            return self.assert_delivered(migration, migration.run())

    def migrate_with_late_map(self, saved: SavedMap, sent: int) -> dict[str, Any]:
        """The map comes when so many pages have been sent, while the guest changes its memory."""
        slow = {"relay__network_bandwidth": 12, **ALL_REFERENCES}
        with self.migration(**slow) as migration, self.dirtying(10, 20, "touch"):
            migration.begin()
            migration.wait_progress("pages are on their way", raw_pages=sent)
            migration.pair.source.use_map(saved)
            migration.wait_progress("the map is used", map="taken")
            summary = self.assert_delivered(migration, migration.finish())
        # Restores what was dirtied.
        self.source.fill()
        return summary

    def test_a_map_that_comes_on_the_way_serves_for_the_rest(self) -> None:
        summary = self.migrate_with_late_map(self.map_of([self.extents]), 15000)
        self.assertGreater(summary["referenced_pages"], 1000)
        self.assertLess(summary["referenced_pages"], len(self.right) - 1000)

    def test_a_wrong_map_that_comes_on_the_way_replaces_nothing(self) -> None:
        random = np.random.default_rng(7)
        wrong = chosen(self.extents, np.full(len(self.right), True),
                       random_blocks(random, self.extents))  # fmt: skip
        summary = self.migrate_with_late_map(self.map_of([wrong]), 15000)
        self.assertGreater(sum(summary["misses"].values()), 1000)

    def assert_from_the_volume(self, summary: dict[str, Any], pages: int) -> None:
        super().assert_from_the_volume(summary, pages)
        self.assertLessEqual(summary["volume_bytes"], self.extents.size)
        expected = summary["raw_pages"] * 4104 + summary["zero_pages"] * 9 + pages * 24
        copies = summary["copies_unasked"] * 4104
        self.assertLess(summary["wire_bytes"], 1.02 * expected + copies + 2 * MIB)

    def test_a_map_of_90_percent_takes_these_pages_off_the_network(self) -> None:
        summary = self.migrate(self.map_of([self.extents]), **ALL_REFERENCES)
        self.assert_from_the_volume(summary, np.count_nonzero(self.right))

    def test_a_map_of_30_percent_takes_these_pages_off_the_network(self) -> None:
        third = np.arange(len(self.right)) < len(self.right) // 3
        summary = self.migrate(self.map_of([chosen(self.extents, third)]), **ALL_REFERENCES)
        self.assert_from_the_volume(summary, np.count_nonzero(self.right & third))

    def test_memory_of_a_stopped_guest_is_the_same_at_both_ends(self) -> None:
        saved = self.map_of([self.extents])
        self.source.stop()
        with self.migration(saved=saved) as migration:
            state = migration.run()
            self.assertEqual((0, 0), migration.pair.wait())
            migration.destination.wait_incoming()
            self.assert_same_memory(migration)
            self.assert_delivered(migration, state)

    def test_without_a_map_nothing_is_read_or_referenced(self) -> None:
        summary = self.migrate(None)
        self.assertEqual(0, summary["referenced_pages"])
        self.assertEqual(0, summary["volume_bytes"])

    def test_an_empty_map_is_a_map_of_nothing(self) -> None:
        summary = self.migrate(self.map_of([]))
        self.assertEqual(0, summary["referenced_pages"])

    def test_pages_of_changed_blocks_come_from_the_source(self) -> None:
        stale = np.zeros(len(self.right), np.bool_)
        stale[::4] = True
        volume = self.copy_of_disk()
        rewrite_blocks(volume, self.extents.volume_offset[stale] // np.uint64(PAGE_SIZE))
        saved = self.map_of([self.extents])
        summary = self.migrate(saved, volume=volume, **ALL_REFERENCES)
        misses = summary["misses"].pop("changed", 0)
        self.assertEqual({}, summary["misses"])
        changed = np.count_nonzero(stale & self.right)
        self.assertLessEqual(misses, changed)
        # What the source sent before it was asked is not counted as a miss.
        self.assertGreaterEqual(misses + summary["copies_unasked"], changed)

    def test_a_map_to_random_blocks_costs_misses_only(self) -> None:
        offsets = random_blocks(np.random.default_rng(1), self.extents)
        saved = self.map_of([chosen(self.extents, slice(None), offsets)])  # type: ignore[arg-type]
        summary = self.migrate(saved, **ALL_REFERENCES)
        answered = sum(summary["misses"].values()) + summary["copies_unasked"]
        self.assertGreater(answered, 0.99 * summary["referenced_pages"])

    def test_a_volume_that_the_destination_does_not_have_costs_misses_only(self) -> None:
        saved = self.map_of([self.extents])
        summary = self.migrate(saved, volumes={}, **ALL_REFERENCES)
        self.assertEqual(0, summary["volume_bytes"])
        self.assertEqual(summary["referenced_pages"], sum(summary["misses"].values()))

    def test_a_volume_that_cannot_be_opened_costs_misses_only(self) -> None:
        saved = self.map_of([self.extents])
        summary = self.migrate(saved, volumes={VOLUME: self.directory / "nowhere"})
        self.assertEqual(0, summary["volume_bytes"])

    def test_over_tls(self) -> None:
        authority = Authority(self.make_directory())
        tls = (
            authority.settings("source", peer="destination"),
            authority.settings("destination", peer="source"),
        )
        summary = self.migrate(self.map_of([self.extents]), tls=tls, **ALL_REFERENCES)
        self.assert_from_the_volume(summary, np.count_nonzero(self.right))

    def test_with_xbzrle(self) -> None:
        # Slower than the guest dirties its pages, so that there are rounds until one is enough.
        options = {"relay__network_bandwidth": 48}
        with self.migration(saved=self.map_of([self.extents]), **options) as migration:
            with self.dirtying(10, 100, "touch"):
                migration.begin(capabilities=["xbzrle"])

                def deltas() -> int:
                    migration.progress()
                    return int(self.source.migration().get("xbzrle-cache", {}).get("pages", 0))

                relays.wait_until(lambda: deltas() > 100, "pages are sent as deltas")
                # More than all that is dirtied takes, however slow this machine is.
                self.assert_delivered(migration, migration.finish(downtime_ms=60_000))
        # Restores what was dirtied.
        self.source.fill()

    def test_with_post_copy_advised_but_never_begun(self) -> None:
        both = ["postcopy-ram"]
        saved = self.map_of([self.extents])
        with self.migration(saved=saved, capabilities=both, **ALL_REFERENCES) as migration:
            summary = self.assert_delivered(migration, migration.run(capabilities=both))
        self.assertIsNone(summary["pass_through"])
        self.assert_from_the_volume(summary, np.count_nonzero(self.right))


class TestHostileMaps(migrations.MigrationTestCase):
    """Maps that no honest guest makes. They may cost the gain, never the migration."""

    guest = {"ram_mb": 128, "fill_mb": 32, "mapped": 80}

    def migrate_with_file(self, content: bytes, **options: Any) -> dict[str, Any]:
        saved = self.map_of([])
        saved.buffer_map.write_bytes(content)
        return self.migrate(saved, **options)

    def migrate_with_volumes(self, *volumes: VolumeMap, **options: Any) -> dict[str, Any]:
        """Maps that are not built, hence not checked."""
        saved = self.map_of([])
        BufferMap(volumes).save(saved.buffer_map)
        return self.migrate(saved, **options)

    def migrate(self, saved: SavedMap, **options: Any) -> dict[str, Any]:
        with self.migration(saved=saved, **options) as migration:
            return self.assert_delivered(migration, migration.run())

    def volume_map(
        self, size: int | None = None, name: str = VOLUME, blocks: Any = None
    ) -> VolumeMap:
        extents = relays.extents(self.source)
        (right,) = BufferMap.build([extents]).volumes
        guest, block = right.pages()
        wanted = block.copy() if blocks is None else np.full(len(guest), blocks, np.uint32)
        return VolumeMap(name, extents.size if size is None else size, guest.copy(), wanted, None)

    def good_file(self) -> bytes:
        return self.map_of().buffer_map.read_bytes()

    def assert_no_map(self, summary: dict[str, Any]) -> None:
        self.assertEqual(0, summary["mapped_pages"])
        self.assertEqual(0, summary["referenced_pages"])

    def test_random_bytes(self) -> None:
        self.assert_no_map(self.migrate_with_file(np.random.default_rng(5).bytes(100_000)))

    def test_a_file_that_breaks_off(self) -> None:
        good = self.good_file()
        self.assert_no_map(self.migrate_with_file(good[: len(good) // 2]))

    def test_a_file_in_which_one_bit_is_wrong(self) -> None:
        damaged = bytearray(self.good_file())
        damaged[len(damaged) // 2] ^= 4
        self.assert_no_map(self.migrate_with_file(bytes(damaged)))

    def test_a_chunk_that_announces_4_gib(self) -> None:
        self.assert_no_map(self.migrate_with_file(b"\xff\xff\xff\xff" + self.good_file()))

    def test_more_pages_than_the_limit(self) -> None:
        summary = self.migrate_with_file(self.good_file(), buffer_map__max_pages=1000)
        self.assert_no_map(summary)

    def test_more_volumes_than_the_limit(self) -> None:
        none = np.empty(0, np.uint32)
        many = [VolumeMap(f"v{n}", MIB, none.copy(), none.copy(), None) for n in range(17)]
        self.assert_no_map(self.migrate_with_volumes(*many))

    def test_blocks_beyond_the_size_that_the_map_itself_tells(self) -> None:
        self.assert_no_map(self.migrate_with_volumes(self.volume_map(size=MIB)))

    def test_a_guest_page_in_two_volumes(self) -> None:
        self.assert_no_map(
            self.migrate_with_volumes(self.volume_map(), self.volume_map(name="other"))
        )

    def test_blocks_beyond_the_real_end_of_the_volume(self) -> None:
        blocks = 1 << 30
        summary = self.migrate_with_volumes(self.volume_map(size=1 << 43, blocks=blocks))
        self.assertGreater(summary["mapped_pages"], 0)
        self.assertEqual(0, summary["volume_bytes"])
        self.assertEqual({"read_error"}, set(summary["misses"]) or {"read_error"})

    def test_a_volume_larger_than_anything(self) -> None:
        self.assert_no_map(self.migrate_with_volumes(self.volume_map(size=1 << 62)))

    def test_all_pages_in_one_block(self) -> None:
        summary = self.migrate_with_volumes(self.volume_map(blocks=7))
        self.assertGreater(summary["mapped_pages"], 0)

    def test_volumes_of_someone_else(self) -> None:
        # Another instance's volume, and a path: neither is looked for.
        for name in ("9a1d6b1c-0000-4000-8000-000000000000", "dev.sda"):
            summary = self.migrate_with_volumes(self.volume_map(name=name))
            self.assertGreater(summary["mapped_pages"], 0)
            self.assertEqual(0, summary["volume_bytes"])

    def test_guest_pages_outside_of_ram(self) -> None:
        """The first MiB, the hole below 4 GiB, and what lies beyond all memory; all of it huge."""
        lengths = np.array([256, 1 << 18, 1 << 24], np.uint32)
        guest = np.array([0, 3 << 18, 1 << 28], np.uint32)
        blocks = np.array([0, 0, 0], np.uint32)
        summary = self.migrate_with_volumes(VolumeMap(VOLUME, 1 << 40, guest, blocks, lengths))
        self.assertEqual(0, summary["mapped_pages"])

    def test_a_run_over_all_memory(self) -> None:
        lengths = np.array([1 << 24], np.uint32)
        nothing = np.zeros(1, np.uint32)
        summary = self.migrate_with_volumes(
            VolumeMap(VOLUME, 1 << 40, nothing, nothing.copy(), lengths)
        )
        self.assertEqual(len(self.source.ram) - 256, summary["mapped_pages"])


class SeedTestCase(migrations.MigrationTestCase):
    """Each seed chooses a map, what happens to the volume meanwhile, and how the relays work."""

    def migrate_seed(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.source.fill(mapped=int(random.choice([30, 60, 90])), zero=5, seed=seed + 1)
        extents = relays.extents(self.source)
        count = len(extents.guest)
        offsets = extents.volume_offset.copy()
        wrong = random.random(count) < random.choice([0, 0.1, 0.5])
        offsets[wrong] = random_blocks(random, extents)[wrong]
        named = random.random(count) < random.choice([0.3, 1])
        saved = self.map_of([chosen(extents, named, offsets)])
        volume = self.copy_of_disk()
        stale = random.random(extents.size // PAGE_SIZE) < random.choice([0, 0.2])
        rewrite_blocks(volume, np.flatnonzero(stale).astype(np.uint64))

        def option(*values: float) -> Any:
            return random.choice(values).item()

        options = {
            "relay__window_size": option(16, 16, 256),
            "relay__read_ahead": option(4, 64),
            "relay__batch_size": option(256, 1024, 4096),
            "relay__channels": option(1, 2, 4),
            "relay__queue_delay": option(1, 10, 100),
            "relay__hurry_threshold": option(0, 250, 60000),
            "relay__hold_pages": option(0, 24576),
            "relay__network_bandwidth": option(0, 50, 100),
            "volume__queue_depth": option(1, 8, 32),
            "volume__read_size": option(16, 256, 1024),
            "volume__merge_gap": option(0, 64, 4096),
            "volume__bandwidth": option(0, 50, 100),
        }
        capabilities = ["xbzrle"] if random.random() < 0.3 else []
        share, rate = int(random.choice([2, 10])), int(random.choice([0, 5, 20]))
        mode = str(random.choice(["touch", "full", "same"]))
        self.addDetail("seed", text_content(f"{options} dirty {share} {rate} {mode}"))
        changing: Callable[[], Any] = contextlib.nullcontext
        if random.random() < 0.5:
            changing = lambda: migrations.rewriting(volume, seed)  # noqa: E731
        with changing(), self.migration(saved=saved, volume=volume, **options) as migration:
            with self.dirtying(share, rate, mode):
                state = migration.run(capabilities=capabilities)
                self.assert_delivered(migration, state)


class TestSeeds(SeedTestCase):
    """Ten seeds of an ordinary guest."""

    def test_seed_00(self) -> None:
        self.migrate_seed(0)

    def test_seed_01(self) -> None:
        self.migrate_seed(1)

    def test_seed_02(self) -> None:
        self.migrate_seed(2)

    def test_seed_03(self) -> None:
        self.migrate_seed(3)

    def test_seed_04(self) -> None:
        self.migrate_seed(4)

    def test_seed_05(self) -> None:
        self.migrate_seed(5)

    def test_seed_06(self) -> None:
        self.migrate_seed(6)

    def test_seed_07(self) -> None:
        self.migrate_seed(7)

    def test_seed_08(self) -> None:
        self.migrate_seed(8)

    def test_seed_09(self) -> None:
        self.migrate_seed(9)


class TestSeedsOfTwoNumaNodes(SeedTestCase):
    """Ten seeds of a guest whose memory is two RAMBlocks, one a NUMA node."""

    guest = {"ram_mb": 192, "fill_mb": 96, "mapped": 90, "numa_nodes": 2, "smp": 2}

    def test_seed_10(self) -> None:
        self.migrate_seed(10)

    def test_seed_11(self) -> None:
        self.migrate_seed(11)

    def test_seed_12(self) -> None:
        self.migrate_seed(12)

    def test_seed_13(self) -> None:
        self.migrate_seed(13)

    def test_seed_14(self) -> None:
        self.migrate_seed(14)

    def test_seed_15(self) -> None:
        self.migrate_seed(15)

    def test_seed_16(self) -> None:
        self.migrate_seed(16)

    def test_seed_17(self) -> None:
        self.migrate_seed(17)

    def test_seed_18(self) -> None:
        self.migrate_seed(18)

    def test_seed_19(self) -> None:
        self.migrate_seed(19)

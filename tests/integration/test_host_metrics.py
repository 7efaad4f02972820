# SPDX-License-Identifier: Apache-2.0
"""What services of hosts tell Prometheus, read as Prometheus does, about real relays."""

import configparser
import os
import re
import signal
import socket
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nova_dmigrate.buffermap import BufferMap
from tests.integration import host_base
from tests.lab import processes
from tests.lab.broker import free_ports
from tests.lab.host_services import HostService, ServedPair
from tests.lab.relays import PATIENCE, VOLUME, SavedMap, wait_until
from tests.unit.relay.guest import FakeGuest
from tests.unit.relay.pair import MTREE, extents_of

MIB = 1 << 20
CHAPTER = Path(__file__).parents[2] / "doc" / "source" / "admin" / "host.rst"


class Metrics:
    """What one service has told at one moment."""

    def __init__(self, service: HostService) -> None:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(service.configuration)
        url = f"http://127.0.0.1:{parser['host']['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            self.text = answer.read().decode()
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        }

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self._values}

    def value(self, name: str, **labels: str) -> float:
        return self._values["nova_dmigrate_" + name, frozenset(labels.items())]

    def sessions(self) -> dict[tuple[str, str], int]:
        """By role and state, where there are any."""
        return {
            (dict(labels)["role"], dict(labels)["state"]): int(value)
            for (name, labels), value in self._values.items()
            if name == "nova_dmigrate_sessions" and value
        }


class HostMetricsTest(host_base.Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {
            "host__metrics_port": free_ports(1)[0],
            "host__max_relays": 1,
            "host__memory_limit": 1024,
            "host__network_bandwidth": 64,
            "volume__bandwidth": 32,
        }

    def guest(self) -> tuple[FakeGuest, ServedPair]:
        """One of whose mapped pages some are not what the volume has; and relays for it."""
        guest = FakeGuest(1, ram_pages=4096, mapped=0.5, stale=0.1)
        here = self.make_directory()
        volume = guest.write_volume(here / "volume")
        saved = SavedMap(here / "map", here / "layout")
        mapped = extents_of(VOLUME, volume.stat().st_size, guest.pages, guest.blocks)
        BufferMap.build([mapped]).save(saved.buffer_map)
        saved.memory_layout.write_text(MTREE.format(end=guest.ram_pages * 4096 - 1))
        return guest, self.pair(volumes={VOLUME: volume}, saved=saved)

    def test_limits_are_told_and_what_there_is_not_is_zero(self) -> None:
        metrics = Metrics(self.one)
        self.assertEqual(1, metrics.value("relays_limit"))
        self.assertEqual(1024 * MIB, metrics.value("memory_limit_bytes"))
        limits = {("host", "network"): 64, ("relay", "volume"): 32, ("host", "volume"): 0}
        for (scope, path), limit in limits.items():
            told = metrics.value("bandwidth_limit_bytes_per_second", scope=scope, path=path)
            self.assertEqual(limit * MIB, told)
        self.assertEqual({}, metrics.sessions())
        self.assertEqual(0, metrics.value("queue_length", role="source"))
        self.assertEqual(0, metrics.value("draining"))
        self.assertEqual(0, metrics.value("misses_total", reason="read_error"))
        self.assertEqual(
            0, metrics.value("migrations_ended_total", role="source", result="cancelled")
        )

    def test_a_migration_is_counted_while_it_runs_and_when_it_has_ended(self) -> None:
        before = [Metrics(each) for each in (self.one, self.two)]
        guest, pair = self.guest()
        pair.open()
        self.assertEqual({("source", "running"): 1}, Metrics(self.one).sessions())
        self.assertEqual({("destination", "running"): 1}, Metrics(self.two).sessions())
        migration = self.fake(pair, guest=guest)
        migration.send(0.5)

        def carried() -> bool:
            pair.source.progress()
            now = Metrics(self.one)
            return grown(before[0], now, "bytes_total", role="source", path="network") > 0

        wait_until(carried, "what is carried meanwhile is counted")
        migration.finish()
        pair.close_sessions()
        after = [Metrics(each) for each in (self.one, self.two)]
        for role, relay, then, now in zip(
            ("source", "destination"), (pair.source, pair.destination), before, after, strict=True
        ):
            summary = relay.client.summary(relay.session_id)
            assert summary is not None
            self.assertEqual({}, now.sessions())
            for path, name in (("network", "wire_bytes"), ("volume", "volume_bytes")):
                self.assertGreater(summary[name], 0)
                self.assertEqual(
                    summary[name], grown(then, now, "bytes_total", role=role, path=path)
                )
            ended = {"role": role, "result": "delivered"}
            self.assertEqual(1, grown(then, now, "migrations_ended_total", **ended))
            if role == "source":
                self.assertGreater(summary["referenced_pages"], 100)
                self.assertEqual(summary["referenced_pages"], grown(then, now, "references_total"))
                self.assertGreater(summary["misses"]["changed"], 10)
                changed = grown(then, now, "misses_total", reason="changed")
                self.assertEqual(summary["misses"]["changed"], changed)
                saved = grown(then, now, "bytes_total", role=role, path="saved")
                self.assertEqual(summary["saved_bytes"], saved)

    def test_what_a_killed_relay_has_done_stays_counted(self) -> None:
        before = Metrics(self.one)
        pair = self.pair().open()
        self.fake(pair).send(0.5)
        counted = wait_until(
            lambda: (pair.source.progress() or {}).get("wire_bytes"), "something was sent"
        )
        (pid,) = self.one.relays()
        os.kill(pid, signal.SIGKILL)
        pair.source.wait("failed")
        pair.close_sessions()
        after = Metrics(self.one)
        self.assertGreaterEqual(
            grown(before, after, "bytes_total", role="source", path="network"), counted
        )
        ended = {"role": "source", "result": "failed"}
        self.assertEqual(1, grown(before, after, "migrations_ended_total", **ended))

    def test_who_waits_is_counted(self) -> None:
        self.pair().open_destination()
        self.pair(wait_seconds=300).open_destination()
        self.assertEqual(1, Metrics(self.two).value("queue_length", role="destination"))
        self.assertEqual(1, Metrics(self.two).sessions()["destination", "queued"])

    def test_the_chapter_names_what_is_told(self) -> None:
        told = Metrics(self.one).names
        named = set(re.findall(r"``(nova_dmigrate_\w+)``", CHAPTER.read_text()))
        self.assertEqual(told, named)

    def test_an_address_that_is_taken_is_a_wrong_configuration(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            service = HostService(
                "three", self.place / "three", self.one.url, host__metrics_port=port
            )
            self.addCleanup(service.close)
            process = service.spawn()
            self.assertEqual(2, process.wait(PATIENCE))
            processes.end(process)
        self.assertIn(f"no metrics at 127.0.0.1, port {port}", service.last_words())


def grown(before: Metrics, after: Metrics, name: str, **labels: str) -> float:
    """By how much a value is more than it was."""
    return after.value(name, **labels) - before.value(name, **labels)

# SPDX-License-Identifier: Apache-2.0
"""What goes on at a host, for Prometheus. Imported only where it is wanted: it needs its client."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nova_dmigrate.host.sessions import Figures
from nova_dmigrate.host.totals import PATHS
from nova_dmigrate.relay.protocol import MissReason
from nova_dmigrate.rpc.host_messages import FINAL, ROLES, STATES

_PREFIX = "nova_dmigrate_"


def serve(figures: Callable[[], Figures], address: str, port: int) -> None:
    """Answer who asks at that address, in threads, until the process ends.

    :raises OSError: it is not possible to listen there.
    """
    registry = CollectorRegistry()
    registry.register(HostCollector(figures))
    start_http_server(port, addr=address, registry=registry)


class HostCollector(Collector):
    """Makes the metrics anew whenever somebody asks.

    All values of a label are there from the beginning, so that rates are right from the first
    migration on.
    """

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        figures = self._figures()
        yield from _sessions(figures)
        yield from _totals(figures)
        yield from _limits(figures)


def _sessions(figures: Figures) -> Iterator[Metric]:
    sessions = _gauge("sessions", "Sessions that the service has, by state", "role", "state")
    for role in ROLES:
        for state in STATES:
            sessions.add_metric((role, state), figures.sessions[role, state])
    yield sessions
    queue = _gauge("queue_length", "Relays that wait for their turn", "role")
    for role in ROLES:
        queue.add_metric((role,), figures.sessions[role, "queued"])
    yield queue
    draining = _gauge("draining", "1 while the service takes no new session")
    draining.add_metric((), figures.draining)
    yield draining


def _totals(figures: Figures) -> Iterator[Metric]:
    totals = figures.totals
    carried = _counter(
        "bytes",
        "Bytes that the network has carried, that compression has saved it, that were read from"
        " volumes at the destination",
        "role",
        "path",
    )
    for role in ROLES:
        for path in PATHS:
            carried.add_metric((role, path), totals.bytes[role, path])
    yield carried
    references = _counter("references", "Guest pages sent as references by this host")
    references.add_metric((), totals.references)
    yield references
    misses = _counter("misses", "References of this host that did not resolve", "reason")
    for reason in MissReason:
        misses.add_metric((reason.name.lower(),), totals.misses[reason.name.lower()])
    yield misses
    ended = _counter("migrations_ended", "Migrations whose relay here has ended", "role", "result")
    for role in ROLES:
        for result in sorted(FINAL):
            ended.add_metric((role, result), totals.ended[role, result])
    yield ended


def _limits(figures: Figures) -> Iterator[Metric]:
    limits = figures.limits
    relays = _gauge("relays_limit", "Relays of one role that may run at the same time")
    relays.add_metric((), limits.max_relays)
    yield relays
    memory = _gauge("memory_limit_bytes", "Memory that all relays may take; 0 for no limit")
    memory.add_metric((), limits.memory)
    yield memory
    bandwidth = _gauge(
        "bandwidth_limit_bytes_per_second",
        "What all relays of the host, or each of them, may use; 0 for no limit",
        "scope",
        "path",
    )
    for scope, rates in (("host", limits.host), ("relay", limits.relay)):
        bandwidth.add_metric((scope, "network"), rates.network)
        bandwidth.add_metric((scope, "volume"), rates.volume)
    yield bandwidth


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_PREFIX + name, text, labels=labels)

# SPDX-License-Identifier: Apache-2.0
"""Requests over the message broker, by oslo.messaging.

Each instance has a virtual host of its own at the broker, see `isolation`: the transport URL that
ends in it reaches one agent and nothing else. The host services share one that no guest can enter.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import socket
import threading
import time
from typing import Any

import oslo_messaging  # type: ignore[import-untyped]
from oslo_config import cfg
from oslo_messaging import opts as messaging_opts

from nova_dmigrate import exception
from nova_dmigrate.rpc.dispatcher import Answer, Dispatcher
from nova_dmigrate.rpc.protocol import Protocol
from nova_dmigrate.rpc.requester import Requester, Requesters
from nova_dmigrate.rpc.transport import Transport

LOG = logging.getLogger(__name__)

_RABBIT = "oslo_messaging_rabbit"
_DEFAULTS = {
    # A server's queues and the exchange go with their last user, so that a request to a guest
    # without an agent comes back at once. Both sides must declare them alike.
    "amqp_auto_delete": True,
    "amqp_durable_queues": True,
    # Half-open connections (the guest was moved, the broker was cut off) are noticed in seconds
    "heartbeat_timeout_threshold": 15,
    "kombu_reconnect_delay": 0.2,
    "rabbit_interval_max": 5,
    # A requester's queue outlives it by so many seconds (1800 without this), and each instance's
    # virtual host takes a few only
    "rabbit_transient_queues_ttl": 15,
    # An answer whose requester has gone must not hold one of the few threads for a minute
    "kombu_missing_consumer_retry_timeout": 2,
    "rabbit_qos_prefetch_count": 8,
}
_THREADS = 4
_AMQP_PORT = 5672
_RETRY_INTERVAL = 2.0  # seconds between attempts to serve at a broker that refuses
_STOP_PATIENCE = 5.0
_MOMENT = 0.25  # seconds that an error of oslo.messaging takes to come from its thread
# Seconds for which, and between which, a broker that is gone is looked for
_RESTART, _LOOK = 2.0, 0.25
_REFUSALS = (oslo_messaging.RemoteError, oslo_messaging.RPCDispatcherError)
_SERVED = (*_REFUSALS, oslo_messaging.MessageUndeliverable)  # errors with which the broker serves


def set_defaults(conf: cfg.ConfigOpts, threads: int = _THREADS) -> None:
    """Register oslo.messaging's options with the defaults that suit one server and one client.

    :param threads: how many requests a server executes at the same time.
    """
    for group, options in messaging_opts.list_opts():
        if group in (None, _RABBIT):
            conf.register_opts(options, group=group)
    # Releases up to 18.3 register these on oslo.config's global object, yet read them from this one
    for part in ("tracing", "metrics"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"oslo_messaging._{part}.client")
            name = f"oslo_messaging_{part}"
            conf.register_opts(getattr(module, name), group=name)
    for name, value in _DEFAULTS.items():
        conf.set_default(name, value, group=_RABBIT)
    messaging_opts.set_defaults(conf, executor_thread_pool_size=threads)


def make_conf() -> cfg.ConfigOpts:
    """Options with these defaults alone, no files read: for who passes a URL."""
    conf = cfg.ConfigOpts()
    set_defaults(conf)
    conf([], project="nova-dmigrate", default_config_files=[], default_config_dirs=[])
    return conf


class BrokerTransport(Transport):
    """The way to the server of one name over the broker.

    :param name: the instance whose agent is asked, or the host.
    :param url: transport URL; for an agent that with the instance's virtual host.
    :param conf: options of oslo.messaging (TLS, ...); see `set_defaults`.
    :raises ConfigurationError: no broker can be at such a URL.
    """

    def __init__(
        self, name: str, url: str, protocol: Protocol, conf: cfg.ConfigOpts | None = None
    ) -> None:
        self._name = name
        self._protocol = protocol
        self._conf = conf or make_conf()
        try:
            parsed = oslo_messaging.TransportURL.parse(self._conf, url)
            self._requesters = Requesters(lambda: self._make_requester(url))
        except (oslo_messaging.MessagingException, ValueError) as error:
            # The URL has a password in it
            raise exception.ConfigurationError(
                reason=f"the transport URL of the broker for {protocol.server}s: {error}"
            ) from error
        self._addresses = [
            (host.hostname, host.port or _AMQP_PORT)
            for host in parsed.hosts
            if parsed.transport == "rabbit"
        ]
        self._known = False

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        end = time.monotonic() + timeout
        requester = self._requesters.take(lambda: self._await_broker(timeout))
        if requester is None:
            raise self._unreachable("the broker does not answer, or the way to it is closed")
        left = max(0.1, end - time.monotonic())
        outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer = self._ask(requester.client, method, request_id, arguments, left)
                outcome.put((answer, None))
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                outcome.put((None, error))
            finally:
                requester.end()

        # oslo.messaging connects without any limit of time: it may keep this thread, not ours.
        threading.Thread(target=ask, name=f"rpc-{method}", daemon=True).start()
        try:
            # The call has its own time-out: let it be the one that tells.
            answer, error = outcome.get(timeout=left + _MOMENT)
        except queue.Empty:
            self._requesters.doubt(requester, stuck=True)
            raise self._unreachable(f"the broker does not answer within {timeout:g} s") from None
        if error is not None:
            if not isinstance(error, _SERVED):
                self._requesters.doubt(requester, stuck=False)
            raise self._translated(error, method) from error
        requester.reached = self._known = True
        return answer

    def close(self) -> None:
        self._requesters.close()

    def _make_requester(self, url: str) -> Requester:
        # No exception class of the other side's choice is ever made here
        transport = oslo_messaging.get_rpc_transport(
            self._conf,
            # Connecting changes the order of its hosts
            url=oslo_messaging.TransportURL.parse(self._conf, url),
            allowed_remote_exmods=[],
        )
        target = oslo_messaging.Target(
            exchange=self._protocol.exchange,
            topic=self._protocol.topic,
            namespace=self._protocol.namespace,
            server=self._name,
        )
        return Requester(transport, oslo_messaging.get_rpc_client(transport, target))

    def _ask(
        self, client: Any, method: str, request_id: str, arguments: dict[str, Any], timeout: float
    ) -> Any:
        prepared = client.prepare(
            version=self._protocol.methods[method].since,
            timeout=timeout,
            retry=1,
            # A queue that does not exist is told at once, not by a time-out
            transport_options=oslo_messaging.TransportOptions(at_least_once=True),
        )
        return prepared.call({}, method, request_id=request_id, arguments=arguments)

    def _await_broker(self, timeout: float) -> None:
        """Where a broker has been before, one that is just being restarted has a moment."""
        end = time.monotonic() + min(timeout, _RESTART)
        while True:
            try:
                self._check_broker(timeout)
            except self._protocol.unreachable:
                if not self._known or time.monotonic() > end:
                    raise
                time.sleep(_LOOK)
            else:
                return

    def _check_broker(self, timeout: float) -> None:
        """Before the first answer: where nobody listens, oslo.messaging would try for ever.

        All brokers are tried at once: one that is off may only tell so by its silence.
        """
        if not self._addresses:
            return
        outcomes: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

        def reach(address: tuple[str, int]) -> None:
            try:
                socket.create_connection(address, timeout=timeout).close()
                outcomes.put(None)
            except OSError as error:
                outcomes.put(error)

        for address in self._addresses:
            threading.Thread(target=reach, args=(address,), name="broker", daemon=True).start()
        end = time.monotonic() + timeout
        last: OSError | str = f"none answers within {timeout:g} s"
        for _ in self._addresses:
            try:
                error = outcomes.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if error is None:
                return
            last = error
        raise self._unreachable(f"no broker can be reached: {last}")

    def _translated(self, error: Exception, method: str) -> exception.RpcError:
        if isinstance(error, oslo_messaging.MessagingTimeout):
            return self._unreachable("no answer in time")
        if isinstance(error, oslo_messaging.MessageUndeliverable):
            return self._unreachable(f"no {self._protocol.server} is connected to the broker")
        if isinstance(error, _REFUSALS):
            # Our own server answers errors as results: this is a version or method it lacks
            return self._protocol.refused_error(
                self._name,
                f"it does not speak version {self._protocol.methods[method].since}",
                "version",
            )
        return self._unreachable(f"the broker failed: {type(error).__name__}: {error}")

    def _unreachable(self, reason: str) -> exception.RpcError:
        return self._protocol.unreachable_error(self._name, reason)


class Endpoint:
    """The methods as oslo.messaging wants them. Public names are methods of the protocol."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        protocol = dispatcher.protocol
        self.target = oslo_messaging.Target(namespace=protocol.namespace, version=protocol.version)

    def _serves(self, name: str) -> bool:
        """Whether that is a method of the protocol."""
        return name in self._dispatcher.protocol.methods

    def __getattr__(self, name: str) -> Any:
        if not self._serves(name):
            raise AttributeError(name)

        def answer(context: Any, request_id: Any = None, arguments: Any = None) -> Answer:
            return self._dispatcher.answer(name, request_id, arguments)

        return answer


class BrokerServer:
    """The answering side: serves at the broker until it is stopped, wherever the broker goes.

    oslo.messaging comes back by itself when the connection breaks. `reconnect` is for when the
    connection is probably dead and nothing has told so yet.
    """

    def __init__(
        self, name: str, dispatcher: Dispatcher, conf: cfg.ConfigOpts, url: str | None = None
    ) -> None:
        """:param name: the instance of the agent, or the host."""
        self._name = name
        self._dispatcher = dispatcher
        self._conf = conf
        self._url = url
        self._lock = threading.Lock()
        self._current: tuple[Any, Any] | None = None
        self._stopped = threading.Event()
        self._wanted = threading.Event()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)

    def start(self) -> None:
        """Begin to serve, in the background: the broker may come later than the server."""
        self._wanted.set()
        self._thread.start()

    def wait_until_serving(self, timeout: float) -> bool:
        return self._serving.wait(timeout)

    def reconnect(self) -> None:
        """Serve by a new connection, then give up the old one. Returns at once."""
        self._serving.clear()
        self._wanted.set()

    def stop(self) -> None:
        """Stop serving; requests under way get a few seconds."""
        self._stopped.set()
        self._wanted.set()
        self._give_up(None)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if self._stopped.is_set():
                return
            try:
                fresh = self._connect()
            except Exception as error:  # noqa: BLE001 - a broker that refuses may allow it later
                LOG.error("The broker cannot be used, next attempt follows: %s", error)
                self._stopped.wait(_RETRY_INTERVAL)
                self._wanted.set()
                continue
            self._give_up(fresh)
            if not self._wanted.is_set():
                self._serving.set()
            LOG.info("Serving %s %s at the broker", self._dispatcher.protocol.peer, self._name)

    def _connect(self) -> tuple[Any, Any]:
        protocol = self._dispatcher.protocol
        transport = oslo_messaging.get_rpc_transport(
            self._conf, url=self._url, allowed_remote_exmods=[]
        )
        target = oslo_messaging.Target(
            exchange=protocol.exchange, topic=protocol.topic, server=self._name
        )
        server = oslo_messaging.get_rpc_server(
            transport,
            target,
            [Endpoint(self._dispatcher)],
            access_policy=_Policy,
        )
        server.start()
        return transport, server

    def _give_up(self, successor: tuple[Any, Any] | None) -> None:
        """Close the current connection, in the background: a dead one may take its time."""
        with self._lock:
            old, self._current = self._current, successor
            if self._stopped.is_set() and successor is not None:
                old, self._current = successor, None
        if old is None:
            return
        transport, server = old

        def close() -> None:
            with contextlib.suppress(Exception):
                server.stop()
                _cut(server)
                server.wait()
            with contextlib.suppress(Exception):
                transport.cleanup()

        closer = threading.Thread(target=close, name="broker-close", daemon=True)
        closer.start()
        if self._stopped.is_set():
            closer.join(_STOP_PATIENCE)


def _cut(server: Any) -> None:
    """Break the connection of a server that has been stopped.

    Closing it in order, oslo.messaging still takes, acknowledges and loses requests that have
    been delivered meanwhile; when the connection breaks, the broker gives them to the successor.
    Without these private names closing goes its usual way, and clients have to ask again.
    """
    with contextlib.suppress(AttributeError, OSError):
        connection = server.listener._poll_style_listener.conn.connection.connection
        connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)


class _Policy(oslo_messaging.RPCAccessPolicyBase):  # type: ignore[misc]
    """Only what the protocol names can be called."""

    def is_allowed(self, endpoint: object, method: str) -> bool:
        return isinstance(endpoint, Endpoint) and endpoint._serves(method)

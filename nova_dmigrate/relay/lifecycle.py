# SPDX-License-Identifier: Apache-2.0
"""The threads of one relay: they run together, and the first failure of one ends them all."""

import functools
import threading
import time
from collections.abc import Callable

from oslo_log import log

from nova_dmigrate import exception

LOG = log.getLogger(__name__)

#: Seconds that threads which may hang get to come to their end.
_HANG_SECONDS = 2.0


class Lifecycle:
    """Starts named threads and remembers the first failure.

    A failure calls the closers, which wake whatever blocks (sockets are shut down, queues are
    closed), so that all threads come to their end. What they raise after that is a consequence and
    is logged as such.

    :ivar kept: whether nobody can cancel any more.
    """

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._threads: list[threading.Thread] = []
        self._hanging: list[threading.Thread] = []
        self._closers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._begun = threading.Event()
        self.kept = False
        self.failure: exception.DMigrateError | None = None

    @property
    def failed(self) -> bool:
        """Whether anything has failed."""
        return self.failure is not None

    def on_failure(self, closer: Callable[[], None]) -> None:
        """Have ``closer`` called at the first failure; at once if that has been."""
        with self._lock:
            self._closers.append(closer)
            failed = self.failed
        if failed:
            closer()

    def fail(self, error: BaseException) -> None:
        """Something ended that must not end."""
        if not isinstance(error, exception.DMigrateError):
            LOG.exception("Unexpected error in the relay of %s", self._instance, exc_info=error)
            error = exception.RelayError(
                instance=self._instance, reason=f"unexpected {type(error).__name__}: {error}"
            )
        with self._lock:
            closers = self._failed(error)
        self._close(closers)

    def _failed(self, error: exception.DMigrateError) -> list[Callable[[], None]] | None:
        """Remember a failure, with the lock held; whom to tell if it is the first one."""
        if self.failure is not None:
            LOG.debug("After the failure of the relay of %s: %s", self._instance, error)
            return None
        self.failure = error
        return list(self._closers)

    def _close(self, closers: list[Callable[[], None]] | None) -> None:
        if closers is None:
            return
        for closer in closers:
            try:
                closer()
            except Exception:  # the others have to be called all the same
                LOG.exception("Unexpected error at the end of the relay of %s", self._instance)
        self._closed.set()

    def start(
        self, name: str, target: Callable[[], None], *, may_hang: bool = False
    ) -> threading.Thread:
        """Run ``target`` in a thread of its own; what it raises is a failure.

        :param may_hang: it may be stuck in the kernel, so the end does not wait for it for long.
        """
        thread = threading.Thread(target=self._guarded, args=(target,), name=name, daemon=True)
        with self._lock:
            (self._hanging if may_hang else self._threads).append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        """Wait for all threads; then raise the first failure, if any."""
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            self._closed.wait()
        deadline = time.monotonic() + _HANG_SECONDS
        for thread in self._hanging:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                LOG.warning("%s: thread %s is left behind", self._instance, thread.name)
        if self.failure is not None:
            raise self.failure

    def outcome(self) -> tuple[str, str | None]:
        """Wait for all threads; returns "delivered", "cancelled" or "failed", and the reason."""
        try:
            self.join()
        except exception.MigrationCancelled as error:
            return "cancelled", str(error)
        except exception.DMigrateError as error:
            return "failed", str(error)
        return "delivered", None

    def cancel(self) -> bool:
        """Somebody wants the migration to end; whether it does."""
        error = exception.MigrationCancelled(instance=self._instance, reason="cancelled by request")
        with self._lock:
            if self.kept:
                LOG.warning(
                    "Instance %s: the relay is not cancelled, the guest may need it: post-copy may"
                    " have begun",
                    self._instance,
                )
                return False
            closers = self._failed(error)
        self._close(closers)
        return True

    def keep(self) -> None:
        """Let nobody cancel from now on. Failures are failures all the same."""
        with self._lock:
            self.kept = self.failure is None

    def limit_waiting(self, seconds: float) -> None:
        """Fail unless `begin` is called within that time."""
        self.on_failure(self._begun.set)
        self.start("patience", functools.partial(self._wait_for_begin, seconds))

    def begin(self) -> None:
        """What was waited for has begun."""
        self._begun.set()

    def _wait_for_begin(self, seconds: float) -> None:
        if not self._begun.wait(seconds):
            raise exception.QemuError(
                instance=self._instance, reason=f"QEMU has not begun within {seconds:g} s"
            )

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:  # a thread that ends silently would leave the others waiting
            self.fail(error)

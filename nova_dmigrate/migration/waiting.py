# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer may take its time, asked so that whoever waits can still give up."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

_T = TypeVar("_T")

#: Called several times a second by whoever waits for something. What it raises ends the waiting.
Waiting = Callable[[], None]

_POLL = 0.2  # seconds


def answer_of(ask: Callable[[], _T], waiting: Waiting) -> _T:
    """What ``ask`` returns, or raises. It runs in a thread, and there it comes to its own end when
    nobody waits for it any more.
    """
    answer = _asked(ask)
    while not futures.wait((answer,), _POLL).done:
        waiting()
    return answer.result()


def answer_within(seconds: float, ask: Callable[[], _T], waiting: Waiting) -> _T:
    """The same, within so many seconds; ``ask`` may be something that never comes to its end.

    :raises TimeoutError: there is no answer by then.
    """
    end = time.monotonic() + seconds

    def still_waiting() -> None:
        waiting()
        if time.monotonic() > end:
            raise TimeoutError(f"there is no answer within {seconds:g} s")

    return answer_of(ask, still_waiting)


class Question(Generic[_T]):
    """One question that is asked again and again by somebody who has more to do than to wait.

    :param ask: as in `answer_of`. It is not asked again before it has answered.
    """

    def __init__(self, ask: Callable[[], _T]) -> None:
        self._ask = ask
        self._answer: futures.Future[_T] | None = None

    def answer(self) -> _T | None:
        """Its answer, or what it raises; None if that does not come within a moment."""
        answer = self._answer = self._answer or _asked(self._ask)
        if not futures.wait((answer,), _POLL).done:
            return None
        self._answer = None
        return answer.result()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most until nothing is being asked; whether that is so."""
        return self._answer is None or bool(futures.wait((self._answer,), seconds).done)


class Setting(Generic[_T]):
    """One value that is set by somebody who has more to do than to wait.

    :param put: sets it; whether that was possible. It may never come to its end.
    """

    def __init__(self, put: Callable[[_T], bool]) -> None:
        self._put = put
        self._putting: tuple[_T, Question[bool]] | None = None

    def set(self, value: _T) -> bool:
        """Set it; whether that has been done. To be called until it has."""
        # One after the other: the last one that was asked for has to be the last one set
        if self._putting is None:
            self._putting = value, Question(lambda: self._put(value))
        put, question = self._putting
        done = question.answer()
        if done is not None:
            self._putting = None
        return bool(done) and put == value


def _asked(ask: Callable[[], _T]) -> futures.Future[_T]:
    answer: futures.Future[_T] = futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            answer.set_exception(error)

    # No pool: at the program's end its threads are waited for
    threading.Thread(target=run, name="ask", daemon=True).start()
    return answer

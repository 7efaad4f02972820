# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer may take its time, asked so that whoever waits can still give up."""

import threading
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

_T = TypeVar("_T")

#: Called several times a second by whoever waits for something. What it raises ends the waiting.
Waiting = Callable[[], None]

_POLL = 0.2  # seconds


def answer_of(ask: Callable[[], _T], waiting: Waiting) -> _T:
    """What ``ask`` returns, or raises. It runs in a thread, and there it comes to its own end when
    nobody waits for it any more.
    """
    answer: futures.Future[_T] = futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            answer.set_exception(error)

    # No pool: at the program's end its threads are waited for
    threading.Thread(target=run, name="ask", daemon=True).start()
    while not futures.wait((answer,), _POLL).done:
        waiting()
    return answer.result()

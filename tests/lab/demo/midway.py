# SPDX-License-Identifier: Apache-2.0
"""Something that happens in mid-migration."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tests.lab.demo.clients import ClientError


@contextlib.contextmanager
def midway(
    carried: Callable[[], int], more: float, act: Callable[[threading.Event], None]
) -> Iterator[None]:
    """Act, in a thread of its own, as soon as a network has carried so many bytes more.

    :param carried: how many it has.
    :param act: is given what is set when the migration is over.
    :raises ClientError: it never came to that, or what was done has failed.
    """
    over = threading.Event()
    enough = carried() + more

    def came() -> bool:
        while carried() < enough:
            if over.wait(0.2):
                return False
        act(over)
        return True

    with ThreadPoolExecutor(1, "trouble") as pool:
        trouble = pool.submit(came)
        try:
            yield
        finally:
            over.set()
    try:
        if not trouble.result():
            raise ClientError("the trouble never came: the network has carried too little")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise ClientError(f"the trouble did not come, or did not go: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""Programs that need more than is installed say so in one sentence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_WRONG_CONFIGURATION = 2


@contextlib.contextmanager
def needed(program: str, extra: str) -> Iterator[None]:
    """What a program imports within this belongs to an extra of the package.

    :raises SystemExit: it is not installed, which has been told then.
    """
    try:
        yield
    except ImportError as error:
        # Without a part of ours it is not a question of extras
        if (error.name or "").partition(".")[0] == "nova_dmigrate":
            raise
        print(
            f"{program}: the extra {extra!r} is not installed"
            f" (pip install 'nova-dmigrate[{extra}]'): {error}",
            file=sys.stderr,
        )
        raise SystemExit(_WRONG_CONFIGURATION) from error

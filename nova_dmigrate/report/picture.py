# SPDX-License-Identifier: Apache-2.0
"""A plot that has been drawn."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Picture:
    """One plot.

    :ivar name: of its file, without ending.
    :ivar title: the heading.
    :ivar description: what it shows, for who cannot see it, and as its caption.
    :ivar png: the file's content.
    """

    name: str
    title: str
    description: str
    png: bytes

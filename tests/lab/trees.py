# SPDX-License-Identifier: Apache-2.0
"""Programs of other releases of Debian, in a tree of their own.

``mmdebstrap --variant=extract`` unpacks a program with its libraries in seconds; nothing of it is
installed or configured. The tree is kept in the cache and never written to.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tests.lab import image
from tools.corpus import emulators

#: An empty directory in each tree, for what its program shall see of this machine.
MOUNT_POINT = Path("/lab")


class TreeError(Exception):
    """A suite does not have the program; the message says which."""


@dataclass(frozen=True)
class Release:
    """Packages of a suite, and files (path to content) that they need in their tree."""

    suite: str
    packages: str
    program: str
    files: tuple[tuple[str, str], ...] = ()

    def tree(self) -> Path:
        """Their tree, from the cache if it is there. Safe in several processes at once.

        :raises EmulatorError: they are not to be had.
        :raises TreeError: the suite no longer has that program.
        """
        cache = image.cache_directory()
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        target = cache / f"server-{self.suite}-{digest}"
        with image.locked(cache / f"server-{self.suite}.lock"):
            if not target.is_dir():
                image.into_place(target, self._build)
        return target

    def _build(self, directory: Path) -> None:
        emulators.unpack(self.suite, self.packages, directory)
        if not (directory / self.program.lstrip("/")).exists():
            raise TreeError(f"{self.suite} has no {self.program} any more")
        directory.chmod(0o755)
        (directory / MOUNT_POINT.relative_to("/")).mkdir()
        for name, content in self.files:
            (directory / name).write_text(content)

# SPDX-License-Identifier: Apache-2.0
"""The volume of a guest of the demo: its database is loaded on this machine, once, and cached."""

import hashlib
import struct
import subprocess
from pathlib import Path

from tests.lab import image
from tests.lab.database_image import Release, database_image
from tests.lab.demo.clients import ROOT
from tests.lab.demo.workloads import loader

_SCRIPT = Path(__file__).with_name("volume.sh")
#: Beside the tables: redo and undo logs, dictionary, and room for what the load adds.
_OVERHEAD_MB = 640
_SECTOR, _BEGIN = 512, 2048
#: Seconds.
_PATIENCE = 1200


def create_volume(release: Release, load: str, pool_mb: int, path: Path) -> Path:
    """Write a volume with the tables of a load, which fill a pool of that size.

    :raises ImageError: it cannot be made.
    """
    made = database_image(release)
    tables = loader(load, pool_mb)
    digest = hashlib.sha256(repr((made.root.parent.name, pool_mb, tables)).encode())
    digest.update(_SCRIPT.read_bytes())
    cache = image.cache_directory()
    target = cache / f"demo-volume-{release.suite}-{digest.hexdigest()[:16]}"
    with image.locked(cache / f"demo-volume-{release.suite}.lock"):
        if not target.is_dir():
            image.into_place(target, lambda here: _load(release, made.root, pool_mb, tables, here))
    image.run(["cp", "--sparse=always", str(target / "volume.raw"), str(path)], path.parent)
    return path


def _load(release: Release, root: Path, pool_mb: int, tables: list[str], directory: Path) -> None:
    volume, mountpoint = directory / "volume.raw", directory / "root"
    mountpoint.mkdir()
    sectors = (pool_mb + _OVERHEAD_MB) << 11
    with open(volume, "wb") as file:
        file.truncate(sectors * _SECTOR)
        # A table of one partition: of Linux, from the 2048th sector to the end
        file.seek(446)
        file.write(struct.pack("<4xB3xII", 0x83, _BEGIN, sectors - _BEGIN))
        file.seek(_SECTOR - 2)
        file.write(b"\x55\xaa")
    argv = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    argv += ["--propagation", "private", "bash", str(_SCRIPT), str(root), str(volume)]
    argv += [str(mountpoint), str(release.script), str(pool_mb), *tables]
    done = subprocess.run(
        argv,
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=_PATIENCE,
    )  # fmt: skip
    if done.returncode:
        raise image.ImageError(f"the volume cannot be loaded: {done.stdout}{done.stderr}")
    mountpoint.rmdir()

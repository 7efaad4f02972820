# SPDX-License-Identifier: Apache-2.0
"""The guest's kernel, initramfs and data disk. Kernel and initramfs are built once and cached.

The cache is the directory NDM_CACHE (default ~/.cache/nova-dmigrate). The kernel is Debian's cloud
kernel, downloaded as a package and unpacked, never installed.
"""

import contextlib
import fcntl
import hashlib
import lzma
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.lab.processes import end, spawn

META_PACKAGE = "linux-image-cloud-amd64"
# In the order of their dependencies; a kernel that has one built in just lacks the file.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
#: Seconds for one command; some install a whole system over a network.
PATIENCE = 1800.0
#: Seconds in which one that is given up may put away what it has mounted and made.
_END_PATIENCE = 20.0
GUEST_SOURCE = Path(__file__).with_name("guest.c")


class ImageError(Exception):
    """The guest image cannot be built; the message says which step failed and how."""


@dataclass(frozen=True)
class Image:
    kernel: Path
    initramfs: Path


def cache_directory() -> Path:
    base = os.environ.get("NDM_CACHE")
    path = Path(base) if base else Path.home() / ".cache" / "nova-dmigrate"
    path.mkdir(parents=True, exist_ok=True)
    return path


def guest_image() -> Image:
    """Kernel and initramfs, from the cache if they are there. Safe in several processes at once."""
    cache = cache_directory()
    with locked(cache / "lab.lock"):
        kernel = cache / "lab-kernel"
        if not kernel.is_dir():
            into_place(kernel, _unpack_kernel)
        digest = hashlib.sha256(GUEST_SOURCE.read_bytes())
        digest.update(Path(__file__).read_bytes())
        digest.update((kernel / "version").read_bytes())
        guest = cache / f"lab-guest-{digest.hexdigest()[:16]}"
        if not guest.is_dir():
            into_place(guest, lambda directory: _build_initramfs(kernel, directory))
    return Image(kernel / "vmlinuz", guest / "initramfs.cpio")


def create_disk(path: Path, size_mb: int, seed: int = 1) -> Path:
    """Write a raw data disk of incompressible bytes, the same for the same seed."""
    random = np.random.Generator(np.random.SFC64(seed))
    with open(path, "wb") as disk:
        for start in range(0, size_mb, 16):
            disk.write(random.bytes(min(16, size_mb - start) << 20))
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def into_place(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside the target, then rename: the target exists whole or not at all."""
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(directory)
        directory.rename(target)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(argv: list[str], cwd: Path) -> str:
    """Run a command to its end; what it prints.

    :raises ImageError: it failed, or took longer than `PATIENCE`; then it has ended, with all that
        it has started.
    """
    try:
        process = spawn(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ImageError(f"{argv[0]} is not installed") from None
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ImageError(f"{' '.join(argv)} has not ended within {PATIENCE:g} s") from None
    finally:
        given_up = process.poll() is None
        end(process, [(signal.SIGTERM, _END_PATIENCE)])
        if given_up:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ImageError(f"{' '.join(argv)} failed: {errors.strip() or output.strip()}")
    return output


def download_kernel(directory: Path) -> Path:
    names = re.findall(
        r"Depends: (linux-image-\S+)", run(["apt-cache", "depends", META_PACKAGE], directory)
    )
    if not names:
        raise ImageError(f"{META_PACKAGE} is not in the package lists")
    run(["apt-get", "download", names[0]], directory)
    return next(directory.glob("*.deb"))


def _unpack_kernel(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        try:
            package = download_kernel(work)
        except ImageError:  # no package lists yet, or older than the archive
            run(["apt-get", "update"], work)
            package = download_kernel(work)
        run(["dpkg-deb", "-x", package.name, "root"], work)
        kernel = next((work / "root/boot").glob("vmlinuz-*"))
        (directory / "modules").mkdir()
        # /usr/lib/modules in newer releases
        modules = next(d for d in (work / "root").glob("**/lib/modules/*") if d.is_dir())
        for module in MODULES:
            for found in modules.glob(f"kernel/**/{module}.ko*"):
                target = directory / "modules" / f"{module}.ko"
                target.write_bytes(decompressed(found))
        (directory / "version").write_text(package.name + "\n")
        shutil.copyfile(kernel, directory / "vmlinuz")


def decompressed(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", module], capture_output=True, check=True).stdout
    return module.read_bytes()


def _build_initramfs(kernel: Path, directory: Path) -> None:
    init = directory / "init"
    run(["gcc", "-static", "-O2", "-Wall", "-o", str(init), str(GUEST_SOURCE)], directory)
    present = [m for m in MODULES if (kernel / "modules" / f"{m}.ko").exists()]
    entries: list[tuple[str, int, bytes]] = [
        ("dev", 0o040755, b""),
        ("modules", 0o040755, b""),
        ("modules/list", 0o100644, "".join(f"{m}.ko\n" for m in present).encode()),
        ("init", 0o100755, init.read_bytes()),
    ]
    for module in present:
        content = (kernel / "modules" / f"{module}.ko").read_bytes()
        entries.append((f"modules/{module}.ko", 0o100644, content))
    (directory / "initramfs.cpio").write_bytes(cpio(entries))


def cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive of (name, mode, content), owned by root."""
    archive = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)

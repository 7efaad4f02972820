# SPDX-License-Identifier: Apache-2.0
"""Root disk, kernel and initramfs of the database guest. Disk and kernel are built once and cached.

The disk is Debian 12 with MariaDB and what the agent imports; a small database is in it. The agent
itself is in the initramfs, which takes no time to make: it is always that of this tree.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import blake3

import nova_dmigrate
from nova_dmigrate.agent import database
from tests.lab import image

SUITE = "bookworm"
# Of that suite; the agent's compiled dependency comes from the interpreter that runs the tests.
PYTHON = (3, 11)
PACKAGES = (
    *("mariadb-server", "python3", "python3-numpy", "python3-oslo.config", "python3-oslo.log"),
    *("python3-pymysql", "lvm2", "xfsprogs", "e2fsprogs", "fdisk", "kmod", "busybox-static"),
)
# In the order of their dependencies; one that is built in just lacks the file.
MODULES = (
    *image.MODULES,
    *("crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4"),
)
ROWS = 150_000
SQL_PASSWORD = "of the lab"
SCRIPTS = Path(__file__).with_name("database_guest_scripts")
_DISK_MB = 2048
_NEEDED = ("mmdebstrap", "mkfs.ext4")


@dataclass(frozen=True)
class DatabaseImage:
    """``root``: raw disk, never written to. ``busybox``, ``modules``: for the initramfs."""

    kernel: Path
    root: Path
    busybox: Path
    modules: Path


def unavailable() -> str | None:
    """Why the image cannot be made or used here, None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if sys.version_info[:2] != PYTHON:
        return f"the guest's Python is {PYTHON[0]}.{PYTHON[1]}"
    for program in _NEEDED:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"{program} is not installed"
    return None


def database_image() -> DatabaseImage:
    """The image, from the cache if it is there. Safe in several processes at once.

    :raises ImageError: it cannot be built.
    """
    cache = image.cache_directory()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update((SCRIPTS / "seed.sh").read_bytes())
    target = cache / f"database-guest-{digest.hexdigest()[:16]}"
    with image.locked(cache / "database-guest.lock"):
        if not target.is_dir():
            image.into_place(target, _build)
    return DatabaseImage(
        target / "vmlinuz", target / "root.raw", target / "busybox", target / "modules"
    )


def make_initramfs(made: DatabaseImage, path: Path) -> Path:
    """Write the initramfs with the scripts and this tree's agent in it."""
    present = [name for name in MODULES if (made.modules / f"{name}.ko").exists()]
    files = {
        "init": (SCRIPTS / "initramfs.sh").read_bytes(),
        "bin/busybox": made.busybox.read_bytes(),
        "modules/list": "".join(f"{name}.ko\n" for name in present).encode(),
        "payload/init.sh": (SCRIPTS / "init.sh").read_bytes(),
        "payload/agent.conf": _agent_config().encode(),
        "payload/password": SQL_PASSWORD.encode(),
    }
    for name in present:
        files[f"modules/{name}.ko"] = (made.modules / f"{name}.ko").read_bytes()
    for package in (nova_dmigrate, blake3):
        directory = Path(str(package.__file__)).parent
        for file in sorted(directory.rglob("*")):
            if file.is_file() and file.suffix in (".py", ".so"):
                files[f"payload/{directory.name}/{file.relative_to(directory)}"] = file.read_bytes()
    entries: dict[str, tuple[str, int, bytes]] = {}
    for name, content in files.items():
        for parent in reversed(Path(name).parents[:-1]):
            entries.setdefault(str(parent), (str(parent), 0o040755, b""))
        entries[name] = (name, 0o100755, content)
    path.write_bytes(image.cpio(list(entries.values())))
    return path


def _agent_config() -> str:
    return (
        "[agent]\ninstance = 00000000-0000-4000-8000-000000000001\ntransport = channel\n"
        "state_directory = /run/nova-dmigrate-agent\nsql_password_file = /run/payload/password\n"
    )


def _build(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        root = work / "root"
        statements = [
            statement.replace("PASSWORD", SQL_PASSWORD)
            for statement in database.grants("mariadb", (10, 11, 0))
        ]
        (work / "grants").write_text("".join(f"{statement};\n" for statement in statements))
        shutil.copyfile(SCRIPTS / "seed.sh", work / "seed.sh")
        seed = f'cp seed.sh "$1/"; chroot "$1" bash /seed.sh {ROWS} "$(cat grants)" </dev/null'
        hook = f'set -e; cd {work}; {seed}; rm "$1/seed.sh"'
        image.run(
            ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
            + ['--aptopt=APT::Install-Recommends "false"']
            + [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")]
            + [f"--customize-hook={hook}", SUITE, str(root)],
            work,
        )
        version = _add_kernel(work, root, directory)
        image.run(["chroot", str(root), "/sbin/depmod", version], work)
        shutil.copyfile(root / "bin/busybox", directory / "busybox")
        with open(directory / "root.raw", "wb") as disk:
            disk.truncate(_DISK_MB << 20)
        image.run(["mkfs.ext4", "-q", "-F", "-d", str(root), str(directory / "root.raw")], work)


def _add_kernel(work: Path, root: Path, directory: Path) -> str:
    """Put the kernel's modules into the root, what boots it beside; the kernel's version."""
    try:
        package = image.download_kernel(work)
    except image.ImageError:  # no package lists yet, or older than the archive
        image.run(["apt-get", "update"], work)
        package = image.download_kernel(work)
    image.run(["dpkg-deb", "-x", package.name, "kernel"], work)
    unpacked = work / "kernel"
    shutil.copyfile(next((unpacked / "boot").glob("vmlinuz-*")), directory / "vmlinuz")
    source = next(each for each in unpacked.glob("**/lib/modules/*") if each.is_dir())
    shutil.copytree(source, root / "usr/lib/modules" / source.name)
    (directory / "modules").mkdir()
    for module in MODULES:
        for found in source.glob(f"kernel/**/{module}.ko*"):
            (directory / "modules" / f"{module}.ko").write_bytes(image.decompressed(found))
    return source.name

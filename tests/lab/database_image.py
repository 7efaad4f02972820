# SPDX-License-Identifier: Apache-2.0
"""Root disk, kernel and initramfs of the database guest. Disk and kernel are built once and cached.

The disk is a release of Debian with a database server and what the agent imports; a small database
is in it. The agent itself is in the initramfs, which takes no time to make: it is always that of
this tree.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nova_dmigrate
from nova_dmigrate.agent import database
from tests.lab import image

SCRIPTS = Path(__file__).with_name("database_guest_scripts")


@dataclass(frozen=True)
class Release:
    """A release of Debian and its database server. The agent runs with its Python.

    ``flavour``, ``version``: of the server, as the agent tells them. ``packages``: the server,
    and what the layouts of a guest's volume need.
    """

    suite: str
    flavour: str
    version: tuple[int, ...]
    packages: tuple[str, ...]

    @property
    def script(self) -> Path:
        """What the guest's scripts have to know of its server."""
        return SCRIPTS / f"{self.flavour}.sh"


MARIADB = Release("bookworm", "mariadb", (10, 11), ("mariadb-server", "lvm2", "xfsprogs"))
# Oracle's own
MYSQL = Release("sid", "mysql", (9,), ("mysql-server-core", "mysql-client-core"))
#: By flavour: options for a guest so small that it has no room for what else a server spends.
LEAN = {"mysql": ("performance-schema=OFF", "innodb-log-buffer-size=16M"), "mariadb": ()}

PACKAGES = (
    *("python3", "python3-numpy", "python3-oslo.config", "python3-oslo.log", "python3-pymysql"),
    *("e2fsprogs", "fdisk", "kmod", "busybox-static"),
)
# What of the agent's imports Debian does not have: the version that the tests run with.
WHEEL = f"blake3=={importlib.metadata.version('blake3')}"
# In the order of their dependencies; one that is built in just lacks the file.
MODULES = (
    *image.MODULES,
    *("crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4"),
)
ROWS = 150_000
SQL_PASSWORD = "of the lab"
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
    for program in _NEEDED:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"{program} is not installed"
    return None


def database_image(release: Release) -> DatabaseImage:
    """The image, from the cache if it is there. Safe in several processes at once.

    :raises ImageError: it cannot be built.
    """
    cache = image.cache_directory()
    digest = hashlib.sha256(repr((release, WHEEL)).encode())
    for part in (Path(__file__), SCRIPTS / "seed.sh", release.script):
        digest.update(part.read_bytes())
    target = cache / f"database-guest-{release.suite}-{digest.hexdigest()[:16]}"
    with image.locked(cache / f"database-guest-{release.suite}.lock"):
        if not target.is_dir():
            image.into_place(target, lambda directory: _build(release, directory))
    return DatabaseImage(
        target / "vmlinuz", target / "root.raw", target / "busybox", target / "modules"
    )


def make_initramfs(release: Release, made: DatabaseImage, path: Path) -> Path:
    """Write the initramfs with the scripts and this tree's agent in it."""
    present = [name for name in MODULES if (made.modules / f"{name}.ko").exists()]
    files = {
        "init": (SCRIPTS / "initramfs.sh").read_bytes(),
        "bin/busybox": made.busybox.read_bytes(),
        "modules/list": "".join(f"{name}.ko\n" for name in present).encode(),
        "payload/init.sh": (SCRIPTS / "init.sh").read_bytes(),
        "payload/guest.sh": (SCRIPTS / "guest.sh").read_bytes(),
        "payload/server.sh": release.script.read_bytes(),
        "payload/agent.conf": _agent_config().encode(),
        "payload/password": SQL_PASSWORD.encode(),
    }
    for name in present:
        files[f"modules/{name}.ko"] = (made.modules / f"{name}.ko").read_bytes()
    package = Path(str(nova_dmigrate.__file__)).parent
    for file in sorted(package.rglob("*.py")):
        files[f"payload/{package.name}/{file.relative_to(package)}"] = file.read_bytes()
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


def _build(release: Release, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        root = work / "root"
        statements = [
            statement.replace("PASSWORD", SQL_PASSWORD)
            for statement in database.grants(release.flavour, release.version)
        ]
        (work / "grants").write_text("".join(f"{statement};\n" for statement in statements))
        shutil.copyfile(SCRIPTS / "seed.sh", work / "seed.sh")
        shutil.copyfile(release.script, work / "server.sh")
        scripts = "seed.sh server.sh"
        seed = f'chroot "$1" bash /seed.sh {ROWS} "$(cat grants)" </dev/null'
        hook = f'set -e; cd {work}; cp {scripts} "$1/"; {seed}; cd "$1"; rm {scripts}'
        packages = ",".join((*PACKAGES, *release.packages))
        image.run(
            ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={packages}"]
            + ['--aptopt=APT::Install-Recommends "false"']
            # A mirror's copy of sid may be older than its Release file allows.
            + ['--aptopt=Acquire::Check-Valid-Until "false"']
            + [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")]
            + [f"--customize-hook={hook}", release.suite, str(root)],
            work,
        )
        _add_wheel(root, work)
        version = _add_kernel(work, root, directory)
        image.run(["chroot", str(root), "/sbin/depmod", version], work)
        shutil.copyfile(root / "bin/busybox", directory / "busybox")
        with open(directory / "root.raw", "wb") as disk:
            disk.truncate(_DISK_MB << 20)
        image.run(["mkfs.ext4", "-q", "-F", "-d", str(root), str(directory / "root.raw")], work)


def _add_wheel(root: Path, work: Path) -> None:
    """Put the wheel for the root's own Python into it."""
    python = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    image.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        + [f"--python-version={python}", f"--target={root}/usr/lib/python3/dist-packages", WHEEL],
        work,
    )


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

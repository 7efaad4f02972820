# SPDX-License-Identifier: Apache-2.0
"""Where the QEMU versions come from: the machine's own, or Debian's packages unpacked beside it.

``mmdebstrap --variant=extract`` unpacks a QEMU and its libraries in seconds and runs none of their
scripts. The dynamic loader of that tree starts the emulator, so neither root nor chroot is needed
and sockets have the same path on both sides.
"""

import os
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass

PACKAGES = "base-files,qemu-system-x86,seabios"
BINARY = "qemu-system-x86_64"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
DATA_DIRECTORIES = ("usr/share/seabios", "usr/share/qemu")
BUILD_TIMEOUT = 900

# What apt must be told again inside mmdebstrap, which does not read the machine's apt.conf.
_APT_OPTIONS = re.compile(r"^(Acquire::(https?|Check-|Retries|ForceIPv)[^ ]*) (\".+\");$", re.M)


class EmulatorError(Exception):
    """A QEMU version cannot be had on this machine."""


@dataclass(frozen=True)
class Emulator:
    """One QEMU: how to start it (argv prefix) and its exact version, such as ``7.2.22``."""

    command: tuple[str, ...]
    version: str

    @property
    def series(self) -> str:
        """The directory of its streams: ``7.2`` for 7.2.x, afterwards the major number alone."""
        major, minor = self.version.split(".")[:2]
        return f"{major}.{minor}" if int(major) < 10 else major

    def oldest_pc(self) -> str:
        """The oldest pc-i440fx machine type that this QEMU still has."""
        text = subprocess.run(
            [*self.command, "-machine", "help"], check=True, capture_output=True, text=True
        ).stdout
        versions = re.findall(r"^pc-i440fx-(\d+)\.(\d+)\s", text, re.M)
        major, minor = min((int(major), int(minor)) for major, minor in versions)
        return f"pc-i440fx-{major}.{minor}"


# The series that the corpus has, with the Debian suite whose QEMU it is.
SUITES = {"7.2": "bookworm", "10": "trixie", "11": "sid"}


def cache_directory() -> pathlib.Path:
    """NDM_CACHE, or ~/.cache/nova-dmigrate."""
    configured = os.environ.get("NDM_CACHE")
    return pathlib.Path(configured or "~/.cache/nova-dmigrate").expanduser()


def find(series: str) -> Emulator:
    """The installed QEMU if it is of this series, else that of the matching Debian suite.

    :raises EmulatorError: when neither is to be had
    """
    if shutil.which(BINARY) and (emulator := installed()).series == series:
        return emulator
    emulator = in_tree(_root(SUITES[series]))
    if emulator.series != series:
        raise EmulatorError(f"Debian {SUITES[series]} now has QEMU {emulator.version}")
    return emulator


def installed() -> Emulator:
    """The QEMU of this machine.

    :raises EmulatorError: it has none
    """
    path = shutil.which(BINARY)
    if path is None:
        raise EmulatorError(f"{BINARY} is not installed")
    return _identify((path,))


def in_tree(root: pathlib.Path) -> Emulator:
    """The QEMU of an unpacked tree, started by the tree's own dynamic loader."""
    data = (arg for name in DATA_DIRECTORIES for arg in ("-L", str(root / name)))
    return _identify((*loaded(root, f"usr/bin/{BINARY}"), *data))


def loaded(root: pathlib.Path, program: str) -> tuple[str, ...]:
    """The start of a command line: a program of an unpacked tree, by the tree's loader."""
    loader = (str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(root / LIBRARIES))
    return (*loader, str(root / program))


def version(command: tuple[str, ...]) -> str:
    """What a program says to ``--version``, such as ``7.2.22``.

    :raises EmulatorError: when that has no such number
    """
    text = subprocess.run(
        [*command, "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    found = re.search(r"\b\d+\.\d+\.\d+", text)
    if not found:
        raise EmulatorError(f"{command[-1]} does not tell its version: {text!r}")
    return found.group()


def _identify(command: tuple[str, ...]) -> Emulator:
    return Emulator(command, version(command))


def _root(suite: str) -> pathlib.Path:
    """The unpacked tree of a suite, made at the first call."""
    directory = cache_directory() / "emulators"
    root = directory / suite
    if root.is_dir():
        return root
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{suite}.{os.getpid()}"
    try:
        unpack(suite, PACKAGES, partial)
        partial.rename(root)
    except OSError as error:
        raise EmulatorError(f"Debian {suite} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def unpack(suite: str, packages: str, directory: pathlib.Path) -> None:
    """Unpack packages (separated by commas) of a Debian suite, with all that they depend on.

    :raises EmulatorError: when they are not to be had
    """
    if not shutil.which("mmdebstrap"):
        raise EmulatorError(f"mmdebstrap is needed for packages of Debian {suite}")
    command = [
        "mmdebstrap",
        "--variant=extract",
        f"--include={packages}",
        *(f"--aptopt={name} {value}" for name, value in _apt_options()),
        # Snapshots of sid are older than its Release file allows.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        "--setup-hook="
        'if [ -d /etc/apt/auth.conf.d ]; then mkdir -p "$1/etc/apt/auth.conf.d"; '
        'cp -r /etc/apt/auth.conf.d/. "$1/etc/apt/auth.conf.d/"; fi',
        suite,
        str(directory),
        _mirror(),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT)
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise EmulatorError(f"Debian {suite} cannot be unpacked: {detail[-2000:]}") from error


def _apt_options() -> list[tuple[str, str]]:
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [(name, value) for name, _, value in _APT_OPTIONS.findall(dump)]


def _mirror() -> str:
    """The URI from which this machine gets Debian's main component.

    :raises EmulatorError: when apt's sources name none
    """
    etc = pathlib.Path("/etc/apt")
    release = pathlib.Path("/etc/os-release").read_text()
    codename = re.search(r"^VERSION_CODENAME=(\w+)", release, re.M)
    suites = {codename.group(1) if codename else "stable", "stable"}
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.+)$", stanza, re.M))
            if suites & set(fields.get("Suites", "").split()):
                return fields["URIs"].split()[0]
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        text = path.read_text() if path.exists() else ""
        for uri, suite in re.findall(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s", text, re.M):
            if suite in suites:
                return str(uri)
    raise EmulatorError("apt's sources name no mirror of Debian")

# SPDX-License-Identifier: Apache-2.0
"""The corpus on disk: one archive for each series of QEMU, and a manifest.

``manifest.json`` is an object: name of the recording (``7.2/pc``) to its facts, see
tools/corpus/record.py; the streams are the members of ``7.2.tar.xz``. They have most of their bytes
in common (SeaBIOS), so that one archive is a tenth of what single files would be.
"""

import hashlib
import io
import json
import lzma
import pathlib
import tarfile
from typing import Any

from tools.corpus.record import Recording

MANIFEST = "manifest.json"
SUFFIX = ".tar.xz"


class Corpus:
    """A directory of recordings; what is added is on disk after ``save``."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.facts: dict[str, dict[str, Any]] = {}
        self._added: dict[str, bytes] = {}
        manifest = directory / MANIFEST
        if manifest.exists():
            self.facts = json.loads(manifest.read_text())

    def streams(self, series: str) -> dict[str, bytes]:
        """All recordings of a series, by their names; empty if there is none.

        :raises ValueError: when one is not the stream of the manifest
        """
        found = self._read(series)
        for name, stream in found.items():
            if hashlib.sha256(stream).hexdigest() != self.facts[name]["sha256"]:
                raise ValueError(f"{name} is not the stream of the manifest")
        return found

    def add(self, name: str, recording: Recording) -> None:
        """Adds or replaces a recording."""
        self._added[name] = recording.stream
        self.facts[name] = recording.facts

    def save(self, series: str) -> int:
        """Writes what was added to a series; returns the size of its archive in bytes."""
        added = {name: s for name, s in self._added.items() if name.startswith(f"{series}/")}
        streams = {**self._read(series), **added}
        self.directory.mkdir(parents=True, exist_ok=True)
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, stream in sorted(streams.items()):
                member = tarfile.TarInfo(name.removeprefix(f"{series}/"))
                member.size = len(stream)
                archive.addfile(member, io.BytesIO(stream))
        data = lzma.compress(raw.getbuffer(), preset=9)
        self._archive(series).write_bytes(data)
        text = json.dumps(dict(sorted(self.facts.items())), indent=1, sort_keys=True)
        (self.directory / MANIFEST).write_text(text + "\n")
        return len(data)

    def _read(self, series: str) -> dict[str, bytes]:
        path = self._archive(series)
        found: dict[str, bytes] = {}
        if path.exists():
            with tarfile.open(path) as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[f"{series}/{member.name}"] = file.read()
        return found

    def _archive(self, series: str) -> pathlib.Path:
        return self.directory / (series + SUFFIX)

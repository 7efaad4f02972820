# SPDX-License-Identifier: Apache-2.0
"""What the source relay does with mapped pages, in this process and on one core: no sockets.

Parse, classify, digest, keep the copy, make the frame. CPU time is what counts, so other load on
the machine disturbs little.
"""

import cProfile
import io
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay.buffers import BufferPool
from nova_dmigrate.relay.classifier import Classifier
from nova_dmigrate.relay.digest import digest_pages
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import REFERENCE, FrameType
from nova_dmigrate.stream.elements import PageRun, RamSetup
from nova_dmigrate.stream.reader import StreamParser
from tests.bench.streams import PAGE, Stream

_BATCH = 1 << 20
#: References that stay unresolved, as in a migration whose volume is a little behind.
_UNRESOLVED = 64


class _DrainedOutbox(Outbox):
    """Hands every frame over at once; references are settled ``_UNRESOLVED`` frames later."""

    def __init__(self, window: Window) -> None:
        super().__init__(window, delay=0, floor=0, fill=lambda idle: None)
        self.window = window
        self._slots: list[np.ndarray] = []
        self.references = 0

    def put(self, parcel: Parcel) -> None:
        if parcel.type is FrameType.REFERENCES:
            slots = np.frombuffer(parcel.payload[0], REFERENCE)["slot"].astype(np.uint32)
            self.references += len(slots)
            self._slots.append(slots)
            if len(self._slots) > _UNRESOLVED:
                self.window.settle(self._slots.pop(0))
        if parcel.done is not None:
            parcel.done()


def run(stream: Stream, buffer_map: Path | None, layout: Path) -> tuple[float, int]:
    """Process a whole stream; CPU seconds of this thread and pages that were referenced."""
    window = Window(256 << 20)
    outbox = _DrainedOutbox(window)
    parser = StreamParser()
    buffer = BufferPool(PAGE, 1).take()
    assert buffer is not None
    pages = mapping = classifier = None
    if buffer_map is not None:
        mapping = BufferMap.load(buffer_map, MapLimits())
        pages = MemoryLayout.from_mtree(layout.read_text())
    position, spent = 0, 0.0
    while position < len(stream.data):
        begin = time.thread_time()
        elements, consumed = parser.parse(stream.data[position : position + _BATCH])
        spent += time.thread_time() - begin
        for element in elements:
            if isinstance(element, RamSetup):
                if mapping is None or pages is None:
                    page_map = PageMap.empty(element.blocks)
                else:
                    page_map = PageMap.build(element.blocks, mapping, pages)
                classifier = Classifier(page_map, window, outbox)
        begin = time.thread_time()
        runs = [element for element in elements if isinstance(element, PageRun)]
        if runs:
            assert classifier is not None
            classifier.handle(runs, buffer)
        spent += time.thread_time() - begin
        position += consumed
    return spent, outbox.references


def digest_rate(stream: Stream) -> float:
    """GB a second of digests alone, the floor of what referencing costs."""
    pages = np.frombuffer(stream.data[: 16384 * PAGE], np.uint8).reshape(-1, PAGE)
    begin = time.thread_time()
    digest_pages(pages)
    return pages.nbytes / (time.thread_time() - begin) / 1e9


def measure(stream: Stream, directory: Path, rounds: int) -> dict[str, Any]:
    """Row ``source`` of bench.json: GB of guest memory a second and core."""
    rates: dict[str, list[float]] = {"referenced": [], "raw": [], "digest": []}
    gigabytes = stream.guest_bytes / 1e9
    for _ in range(rounds):
        rates["digest"].append(digest_rate(stream))
        seconds, count = run(stream, directory / "map", directory / "layout")
        if count * PAGE < stream.guest_bytes * 0.99:
            raise RuntimeError(f"only {count} pages were referenced")
        rates["referenced"].append(gigabytes / seconds)
        rates["raw"].append(gigabytes / run(stream, None, directory / "layout")[0])
    return {
        f"{name}_gb_per_s_per_core": round(statistics.median(values), 3)
        for name, values in rates.items()
    }


def profile(stream: Stream, directory: Path, referenced: bool = True) -> str:
    """The functions in which the time of :func:`run` is spent, as text."""
    profiler = cProfile.Profile()
    profiler.enable()
    run(stream, directory / "map" if referenced else None, directory / "layout")
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(20)
    return text.getvalue()

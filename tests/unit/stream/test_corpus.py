# SPDX-License-Identifier: Apache-2.0
"""The parser against real streams of QEMU 7.2, 10 and 11 (tools/record_corpus.py records them)."""

import functools
import logging
import pathlib
import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st
from testtools.content import text_content

from nova_dmigrate.stream import format as fmt
from tests import base
from tests.unit.stream import corpus_checks as checks
from tests.unit.stream.corpus_checks import Recorded
from tools.corpus.store import Corpus
from tools.corpus.variants import VARIANTS

DIRECTORY = pathlib.Path(__file__).resolve().parents[2] / "corpus"

# Read sizes: of a relay, of a page, one less and more than a record's, and a prime below that.
PIECES = (1 << 20, 1 << 16, fmt.PAGE_SIZE, fmt.PAGE_RECORD_SIZE - 1, fmt.PAGE_RECORD_SIZE + 1, 1009)


@functools.lru_cache(maxsize=1)
def load(series: str) -> tuple[Recorded, ...]:
    """A series' streams, some 100 MB; one series at a time is kept."""
    corpus = Corpus(DIRECTORY)
    streams = corpus.streams(series)
    return tuple(Recorded(name, streams[name], corpus.facts[name]) for name in sorted(streams))


class _Corpus:
    """The tests, for one series of QEMU; a failure names its stream in a detail."""

    series: str

    def setUp(self) -> None:
        super().setUp()
        # Each of some 100,000 parsers would say why it stopped.
        logger = logging.getLogger("nova_dmigrate.stream.reader")
        logger.setLevel(logging.WARNING)
        self.addCleanup(logger.setLevel, logging.NOTSET)

    def each(self, only: str | None = None) -> Iterator[Recorded]:
        for recorded in load(self.series):
            if only in (None, recorded.reason):
                self.addDetail("stream", text_content(recorded.name))
                yield recorded

    def test_every_variant_is_recorded(self) -> None:
        expected = {f"{self.series}/{v.name}" for v in VARIANTS if self.series in v.machine}
        assert {recorded.name for recorded in load(self.series)} == expected

    def test_reading_in_pieces_of_any_size_changes_nothing(self) -> None:
        for number, recorded in enumerate(self.each()):
            size = PIECES[number % len(PIECES)]
            checks.check_pieces(recorded, range(size, len(recorded.stream), size))

    def test_splitting_around_any_element_changes_nothing(self) -> None:
        for recorded in self.each():
            assert checks.check_every_split(recorded) >= 30

    def test_splitting_a_small_stream_anywhere_changes_nothing(self) -> None:
        (recorded,) = (each for each in self.each() if each.variant.tiny)
        assert checks.check_all_splits(recorded) > 40_000

    def test_a_stream_that_ends_early_is_written_up_to_its_last_whole_element(self) -> None:
        for recorded in self.each():
            chosen = random.Random(recorded.name)
            for length in [*range(40), *(chosen.randrange(len(recorded.stream)) for _ in range(9))]:
                checks.check_truncated(recorded, length)

    def test_any_sequence_of_pieces_changes_nothing(self) -> None:
        streams = load(self.series)

        @settings(deadline=None, derandomize=True, max_examples=60, database=None)
        @given(st.sampled_from(range(len(streams))), st.lists(st.floats(0, 1), max_size=12))
        def holds(index: int, cuts: list[float]) -> None:
            stream = streams[index]
            checks.check_pieces(stream, sorted(int(cut * len(stream.stream)) for cut in cuts))

        holds()

    def test_what_is_read_is_what_qemu_counted(self) -> None:
        for recorded in self.each():
            checks.check_facts(recorded)

    def test_what_is_read_adds_up_to_the_destinations_memory(self) -> None:
        for recorded in self.each(fmt.RAM_COMPLETE):
            if recorded.facts["channels"] == 1:
                checks.check_contents(recorded)

    def test_what_follows_ram_are_the_devices_that_qemu_describes(self) -> None:
        for recorded in self.each(fmt.RAM_COMPLETE):
            checks.check_tail(recorded)


class TestQemu72(_Corpus, base.TestCase):
    series = "7.2"


class TestQemu10(_Corpus, base.TestCase):
    series = "10"


class TestQemu11(_Corpus, base.TestCase):
    series = "11"

# SPDX-License-Identifier: Apache-2.0
"""Streams of the lab's QEMU, recorded now and held to the corpus's standards."""

import functools
import logging
from collections.abc import Callable

from nova_dmigrate.stream import format as fmt
from tests import base
from tests.lab import hypervisors
from tests.unit.stream import corpus_checks as checks
from tests.unit.stream.corpus_checks import Recorded
from tools.corpus import emulators
from tools.corpus.record import HugepagesError, record
from tools.corpus.variants import Variant, select

SERIES = next(each for each, suite in emulators.SUITES.items() if suite == hypervisors.suite())
PIECE = 65_536


class TestRecordedNow(base.TestCase):
    """One test for each variant, made below."""

    def check(self, variant: Variant) -> None:
        logger = logging.getLogger("nova_dmigrate.stream.reader")
        logger.setLevel(logging.WARNING)
        self.addCleanup(logger.setLevel, logging.NOTSET)
        try:
            recording = record(variant, _emulator())
        except HugepagesError as error:
            # Also where nothing may be missing: whether the kernel finds enough memory in one
            # piece depends on what ran on the machine before
            self.skipTest(str(error))
        recorded = Recorded(f"{SERIES}/{variant.name}", recording.stream, recording.facts)
        checks.check_facts(recorded)
        checks.check_pieces(recorded, range(PIECE, len(recorded.stream), PIECE))
        checks.check_every_split(recorded)
        if recorded.reason == fmt.RAM_COMPLETE:
            checks.check_tail(recorded)
            if recorded.facts["channels"] == 1:
                checks.check_contents(recorded)


@functools.cache
def _emulator() -> emulators.Emulator:
    found = hypervisors.emulator()
    if found.series != SERIES:
        raise emulators.EmulatorError(f"{hypervisors.suite()} now has QEMU {found.version}")
    return found


def _test_of(variant: Variant) -> Callable[[TestRecordedNow], None]:
    def test(self: TestRecordedNow) -> None:
        self.check(variant)

    return test


for _variant in select(SERIES):
    _name = _variant.name.replace("-", "_").replace(".", "_")
    setattr(TestRecordedNow, f"test_{_name}_reads_as_qemu_wrote_it", _test_of(_variant))

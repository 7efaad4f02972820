#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record the corpus of migration streams anew: tools/record_corpus.py [--series 7.2] [--only pc].

Needs qemu-system-x86 (Debian 12's for the 7.2 streams), mmdebstrap and a minute. Hugepages need
root. What cannot be recorded on a machine is kept from the last time and named at the end.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.corpus import emulators, store  # noqa: E402
from tools.corpus.process import QmpError  # noqa: E402
from tools.corpus.record import RecordingError, record  # noqa: E402
from tools.corpus.variants import SERIES, select  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", action="append", choices=SERIES, help="default: all")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "tests" / "corpus")
    options = parser.parse_args()
    corpus = store.Corpus(options.output)
    failures = []
    for series in options.series or SERIES:
        try:
            emulator = emulators.find(series)
        except emulators.EmulatorError as error:
            failures.append(f"QEMU {series}: {error}")
            continue
        for variant in select(series, options.only):
            try:
                recording = record(variant, emulator)
            except (RecordingError, QmpError) as error:
                failures.append(f"{series}/{variant.name}: {error}")
                continue
            corpus.add(f"{series}/{variant.name}", recording)
            facts = recording.facts
            print(
                f"{series}/{variant.name}: {facts['machine']}, {facts['size']} bytes,"
                f" {facts['statistics']}",
                flush=True,
            )
        print(f"{series}: {corpus.save(series)} bytes compressed", flush=True)
    for failure in failures:
        print(f"NOT RECORDED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

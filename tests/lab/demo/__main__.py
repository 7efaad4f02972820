# SPDX-License-Identifier: Apache-2.0
"""A live database VM moves between two hosts: by pre-copy, by post-copy, by DMigrate.

Chosen by environment variables: NETWORK and VOLUME in MB/s, POOL (share of the guest's RAM), LOAD
(one of sysbench's, or tpcc), RATE (transactions a second that sysbench asks for, 0 for as many as
there can be), DB (mysql, mariadb), RAM (MiB), COMPRESSION (yes, no: whether relays may). Writes
demo-report/.

Exit status: 0 all migrations completed and the database is whole, 1 not so, 2 wrong settings.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from tests.lab import database_image
from tests.lab.demo.compare import Comparison, Scenario, compare, say
from tests.lab.demo.measure import DMIGRATE, POST_COPY, PRE_COPY
from tests.lab.demo.settings import WrongSetting, available_release, shape_from
from tests.lab.processes import workspace

REPORT = Path("demo-report")
MODES = (PRE_COPY, POST_COPY, DMIGRATE)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    reason = database_image.unavailable()
    if reason is not None:
        print(f"The demo cannot run here: {reason}", file=sys.stderr)
        return 2
    try:
        shape = shape_from(os.environ)
    except WrongSetting as error:
        print(error, file=sys.stderr)
        return 2
    result = Comparison()
    try:
        shape = dataclasses.replace(shape, release=available_release(shape.release, say))
        with workspace() as directory:
            compare([Scenario(shape.load, shape, MODES)], directory, result)
    except KeyboardInterrupt:
        say("Interrupted; all of it has been removed")
        return 1
    finally:
        if result.runs:
            result.write(REPORT)
    return 0 if result.whole and all(run["completed"] for run in result.runs) else 1


if __name__ == "__main__":
    sys.exit(main())

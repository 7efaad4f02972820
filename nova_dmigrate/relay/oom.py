# SPDX-License-Identifier: Apache-2.0
"""How likely the kernel ends this process when memory runs out. Source: proc(5), oom_score_adj."""

from pathlib import Path

from oslo_log import log

LOG = log.getLogger(__name__)

#: Of a process whose end costs a migration: better that one than a guest, whose QEMU has 0.
EXPENDABLE = 300

_SCORE = Path("/proc/self/oom_score_adj")


class Expendability:
    """This process is expendable from the moment on at which this is made."""

    def __init__(self) -> None:
        self._inherited = _read()
        if self._inherited is not None and self._inherited < EXPENDABLE:
            _write(EXPENDABLE)

    def spare(self) -> None:
        """It is needed now: as likely as it was when it was started. That needs no privilege."""
        if self._inherited is not None:
            _write(self._inherited)


def _read() -> int | None:
    try:
        return int(_SCORE.read_text())
    except (OSError, ValueError) as error:
        LOG.warning("%s is not told: %s", _SCORE, error)
        return None


def _write(score: int) -> None:
    try:
        _SCORE.write_text(str(score))
    except OSError as error:
        LOG.warning("%s does not become %d: %s", _SCORE, score, error)

# SPDX-License-Identifier: Apache-2.0
"""What became of one migration: the record that is kept, and the sentence that an operator reads.

As JSON it is stable: programs read it from the history and from the command line.
"""

import dataclasses
import datetime
import re
import secrets
from collections.abc import Mapping
from types import NoneType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.findings import Finding, Severity

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
DMIGRATE, ORDINARY = "dmigrate", "ordinary"

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_NUMBER = (int, float)
_TEXT_OR_NONE = (str, NoneType)
_MIB = 1 << 20

#: One row of a series: ``t`` in seconds, and cumulative figures as relays give them.
Row = Mapping[str, Any]


def new_id(now: datetime.datetime | None = None) -> str:
    """An id for a migration that begins: unique, and later ones sort behind, to the second.

    :param now: with a time zone; None for the present.
    """
    utc = datetime.timezone.utc
    moment = datetime.datetime.now(utc) if now is None else now.astimezone(utc)
    return f"{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def is_id(text: str) -> bool:
    """Whether ``text`` could be a migration's id."""
    return _ID.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True)
class MigrationSummary:
    """One migration that has ended.

    :ivar id: as `new_id` makes it.
    :ivar instance: the instance's UUID.
    :ivar domain: libvirt's name of it.
    :ivar source: the host that it was on.
    :ivar destination: the host that it was to go to.
    :ivar mode: ``dmigrate`` or ``ordinary``, as it was in the end.
    :ivar state: ``completed``, ``failed`` or ``cancelled``.
    :ivar started: ISO 8601 with a time zone.
    :ivar total_s: seconds from the request to the end, preparation included.
    :ivar downtime_ms: milliseconds for which the guest stood still, as libvirt reckons it at the
        destination; None if its service did not tell, or had no part in it.
    :ivar fallback_reason: stable code for why it did not go through the relays, or did so without
        the use of volumes.
    :ivar fallback_message: the same as a sentence.
    :ivar error: why it has failed or was cancelled.
    :ivar guest_bytes: bytes of QEMU's stream.
    :ivar wire_bytes: bytes that the network carried.
    :ivar saved_bytes: bytes that it need not carry because the relays compressed the rest.
    :ivar volume_bytes: bytes that the destination read from volumes.
    :ivar pages_referenced: guest pages that were sent as references.
    :ivar misses: references that did not match, or whose block could not be read.
    :ivar mapped_pages: guest pages in the buffer map.
    :ivar mapping_s: seconds until the buffer map was there, beside all the rest; None if it never
        was.
    :ivar phases: seconds by phase, in their order.
    :ivar findings: what was found on the way.
    :ivar series: rows of the ``source`` and the ``destination`` relay, oldest first, and of the
        ``database``, whose ``t`` counts from the request, with cumulative ``commits`` and
        ``queries``, and ``latency_ms``. Of an ordinary one those of ``libvirt`` alone, whose ``t``
        counts so as well, with cumulative ``wire_bytes``.
    :ivar libvirt: libvirt's statistics of the job, by its own names.
    """

    id: str
    instance: str
    domain: str
    source: str
    destination: str
    mode: str
    state: str
    started: str
    total_s: float
    downtime_ms: float | None = None
    fallback_reason: str | None = None
    fallback_message: str | None = None
    error: str | None = None
    guest_bytes: int = 0
    wire_bytes: int = 0
    saved_bytes: int = 0
    volume_bytes: int = 0
    pages_referenced: int = 0
    misses: int = 0
    mapped_pages: int = 0
    mapping_s: float | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    series: Mapping[str, tuple[Row, ...]] = dataclasses.field(default_factory=dict, repr=False)
    libvirt: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["findings"] = [
            {"code": each.code, "severity": each.severity.value, "message": each.message}
            for each in self.findings
        ]
        record["series"] = {end: [dict(row) for row in rows] for end, rows in self.series.items()}
        record["phases"], record["libvirt"] = dict(self.phases), dict(self.libvirt)
        return record

    @classmethod
    def from_dict(cls, record: object) -> "MigrationSummary":
        """The summary of which ``to_dict`` made ``record``.

        Keys that are not known are left out: a later version may have written them.

        :raises SummaryError: something is missing, or of another kind.
        """
        if not isinstance(record, dict):
            raise _error("it is no JSON object")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {key: value for key, value in record.items() if key in fields}
        for name, kinds in _KINDS.items():
            if name not in values:
                if fields[name].default is dataclasses.MISSING:
                    raise _error(f"it has no {name}")
            elif not isinstance(values[name], kinds) or isinstance(values[name], bool):
                raise _error(f"{name} is {values[name]!r:.60}")
        for name, allowed in _CHOICES.items():
            if values[name] not in allowed:
                raise _error(f"{name} is {values[name]!r:.60}")
        if not is_id(values["id"]):
            raise _error(f"id is {values['id']!r:.60}")
        values["phases"] = _phases(values.get("phases", {}))
        values["findings"] = _findings(values.get("findings", []))
        values["series"] = _series(values.get("series", {}))
        values["libvirt"] = _mapping("libvirt", values.get("libvirt", {}))
        return cls(**values)

    def sentence(self) -> str:
        """The one line that an operator reads: how it ended, and why."""
        name = self.domain if self.domain == self.instance else f"{self.domain} ({self.instance})"
        line = f"Migration of {name} from {self.source} to {self.destination}"
        if self.state == COMPLETED:
            line += f" completed in {self.total_s:.1f} s {self._way()}: {self._figures()}"
        else:
            verb = "failed" if self.state == FAILED else "was cancelled"
            line += f" {verb} after {self.total_s:.1f} s {self._way()}"
            line += f": {self.error}" if self.error else ""
        # Errors may quote what a guest said: no control characters, and one line
        return " ".join("".join(c if c.isprintable() else " " for c in line).split())

    def _way(self) -> str:
        way = "through the relays" if self.mode == DMIGRATE else "in the ordinary way"
        if self.fallback_reason is None:
            return way
        link = "because" if self.mode == ORDINARY else "but without the volumes, because"
        return f"{way}, {link} {self.fallback_message or self.fallback_reason}"

    def _figures(self) -> str:
        downtime = "unknown" if self.downtime_ms is None else f"{self.downtime_ms:.0f} ms"
        figures = [f"downtime {downtime}", f"{self.wire_bytes / _MIB:.0f} MiB over the network"]
        if self.mode == DMIGRATE:
            figures += [
                f"{self.saved_bytes / _MIB:.0f} MiB saved by compression",
                f"{self.volume_bytes / _MIB:.0f} MiB from volumes",
                f"{self.pages_referenced} pages by reference",
                f"{self.misses} misses",
            ]
        return ", ".join(figures)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "instance", "domain", "source", "destination"), (str,)),
    **dict.fromkeys(("mode", "state", "started"), (str,)),
    **dict.fromkeys(("fallback_reason", "fallback_message", "error"), _TEXT_OR_NONE),
    **dict.fromkeys(("guest_bytes", "wire_bytes", "saved_bytes", "volume_bytes"), (int,)),
    **dict.fromkeys(("pages_referenced", "misses", "mapped_pages"), (int,)),
    "total_s": _NUMBER,
    **dict.fromkeys(("downtime_ms", "mapping_s"), (*_NUMBER, NoneType)),
}
_CHOICES = {"mode": (DMIGRATE, ORDINARY), "state": (COMPLETED, FAILED, CANCELLED)}


def _error(reason: str) -> exception.SummaryError:
    return exception.SummaryError(reason=reason)


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(f"{name} is {value!r:.60}")
    return value


def _phases(value: object) -> dict[str, float]:
    phases = _mapping("phases", value)
    for name, seconds in phases.items():
        if not isinstance(seconds, _NUMBER) or isinstance(seconds, bool):
            raise _error(f"phase {name} is {seconds!r:.60}")
    return phases


def _findings(value: object) -> tuple[Finding, ...]:
    if not isinstance(value, list):
        raise _error(f"findings are {value!r:.60}")
    try:
        return tuple(
            Finding(str(each["code"]), Severity(each["severity"]), str(each["message"]))
            for each in value
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _error(f"a finding is not understood: {error!r:.60}") from error


def _series(value: object) -> dict[str, tuple[Row, ...]]:
    series = _mapping("series", value)
    for end, rows in series.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise _error(f"the series of {end} has no rows")
    return {end: tuple(rows) for end, rows in series.items()}

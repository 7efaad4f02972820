# SPDX-License-Identifier: Apache-2.0
"""What the events of a server's action say of a live migration."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Of the driver; Nova's own begin with ``compute_`` as well.
EVENT = "compute_dmigrate"
#: Statuses of a migration that is over.
COMPLETED = "completed"
ENDED = frozenset((COMPLETED, "cancelled", "error", "failed"))

_SENTENCE = re.compile(
    r"Migration of .+? from (?P<source>\S+) to (?P<destination>\S+) "
    r"(?P<state>completed in|failed after|was cancelled after) [0-9.]+ s "
    r"(?P<way>through the relays|in the ordinary way)"
    r"(?:, (?P<bare>but without the volumes, )?because (?P<reason>[^:]+))?"
)
#: Nova cuts what an event tells after 255 characters.
_REFERENCES = re.compile(r", (?P<pages>\d+) pages by(?: reference, (?P<misses>\d+) misses)?")
_STATES = {
    "completed in": "completed",
    "failed after": "failed",
    "was cancelled after": "cancelled",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One migration, as the driver has told it.

    :ivar state: ``completed``, ``failed`` or ``cancelled``.
    :ivar relayed: whether it went through the relays.
    :ivar volumes: whether these used the volumes.
    :ivar reason: why not.
    :ivar references: pages that were sent as references.
    :ivar misses: those of them that came to nothing, if the sentence is not cut before that.
    :ivar sentence: all that was told.
    """

    source: str
    destination: str
    state: str
    relayed: bool
    volumes: bool
    reason: str | None
    references: int
    misses: int
    sentence: str

    @property
    def by_dmigrate(self) -> bool:
        return self.relayed and self.volumes


def parse(sentence: str) -> Outcome:
    """What a sentence of the driver says.

    :raises ValueError: it is none.
    """
    found = _SENTENCE.match(sentence)
    if found is None:
        raise ValueError(f"not a sentence of {EVENT}: {sentence!r}")
    relayed = found["way"] == "through the relays"
    counted = _REFERENCES.search(sentence)
    return Outcome(
        source=found["source"],
        destination=found["destination"],
        state=_STATES[found["state"]],
        relayed=relayed,
        volumes=relayed and not found["bare"],
        reason=found["reason"],
        references=int(counted["pages"]) if counted else 0,
        misses=int(counted["misses"] or 0) if counted else 0,
        sentence=sentence,
    )


def of(events: Iterable[Mapping[str, Any]]) -> Outcome | None:
    """What the driver has told in an action's events; None if it has told nothing (yet).

    :raises ValueError: it is not understood.
    """
    for event in events:
        if event["event"] == EVENT and event.get("result"):
            return parse(event.get("details") or "")
    return None


def failure(events: Iterable[Mapping[str, Any]]) -> str | None:
    """What Nova says of what has failed, whatever that was; None if nothing has."""
    for event in events:
        if event.get("result") == "Error":
            return f"{event['event']}: {event.get('details')}"
    return None


def refusal(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a migration that was required to go through the relays was not carried out: what the
    driver has told, or what Nova says that the hosts' checks have; None if nothing tells."""
    told = [event for event in events if event.get("result") == "Error" and event.get("details")]
    told.sort(key=lambda event: event["event"] != EVENT)
    for event in told:
        details: str = event["details"]
        if "required, but" in details:
            return details
    return None


def newest(
    entries: Iterable[Mapping[str, Any]], key: str, known: frozenset[Any]
) -> Mapping[str, Any] | None:
    """The one entry that was not known before; None if there is none.

    :raises ValueError: there are several.
    """
    new = [entry for entry in entries if entry[key] not in known]
    if len(new) > 1:
        raise ValueError(f"somebody else is at work on the server: {new}")
    return new[0] if new else None

# SPDX-License-Identifier: Apache-2.0
"""One live migration of a server, from the request until all has been told."""

import dataclasses
from typing import Any, Protocol

from tests.scenario import outcome


class Cloud(Protocol):
    """What is asked of the cloud: `tests.scenario.cloud`."""

    def live_migrate(self, server: str) -> None: ...

    def abort(self, server: str, migration: int) -> bool: ...

    def migrations(self, server: str) -> list[dict[str, Any]]: ...

    def actions(self, server: str) -> list[dict[str, Any]]: ...

    def events(self, server: str, request_id: str) -> list[dict[str, Any]]: ...

    def host_of(self, server: str) -> str: ...

    def wait_for(self, what: str, condition: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Move:
    """How a live migration went.

    :ivar source, host: where the server was before, and is afterwards.
    :ivar status: of Nova's migration.
    :ivar events: of the server's action.
    :ivar aborted: whether Nova took the order to abort it.
    """

    source: str
    host: str
    status: str
    events: tuple[dict[str, Any], ...]
    aborted: bool = False

    @property
    def outcome(self) -> outcome.Outcome | None:
        """What the driver has told; None if it has had nothing to do with it."""
        return outcome.of(self.events)

    @property
    def refusal(self) -> str | None:
        """Why it was refused, where the relays were required."""
        return outcome.refusal(self.events)

    def __str__(self) -> str:
        if self.outcome:
            told = self.outcome.sentence
        else:
            told = self.refusal or outcome.failure(self.events) or "the driver says nothing"
        return f"from {self.source} to {self.host}, {self.status}: {told}"


def move(cloud: Cloud, server: str, told: bool, abort: bool = False) -> Move:
    """Migrate a server; returns when Nova has put it down, wherever.

    :param told: whether the driver will tell of it, which may be a moment later.
    :param abort: have it aborted as soon as it runs.
    :raises AssertionError: it is not over in time, or not told.
    """
    migrations = frozenset(each["id"] for each in cloud.migrations(server))
    actions = frozenset(each["request_id"] for each in cloud.actions(server))
    source = cloud.host_of(server)
    cloud.live_migrate(server)
    aborted = False

    def ended() -> Any:
        nonlocal aborted
        found = outcome.newest(cloud.migrations(server), "id", migrations)
        if found is None:
            return None
        # Nova takes it earlier as well, but then the driver has nothing to do with it
        if abort and not aborted and found["status"] == "running":
            aborted = cloud.abort(server, found["id"])
        return found["status"] if found["status"] in outcome.ENDED else None

    status = cloud.wait_for(f"the migration of server {server}", ended)
    events = _events(cloud, server, actions, told)
    return Move(source, cloud.host_of(server), status, tuple(events), aborted)


def _events(cloud: Cloud, server: str, known: frozenset[Any], told: bool) -> list[dict[str, Any]]:
    """The events of the migration's action, all of which have ended.

    :param told: that of the driver is among them, unless something has failed before it.
    """

    def complete() -> Any:
        action = outcome.newest(cloud.actions(server), "request_id", known)
        if action is None:
            return None
        events = cloud.events(server, action["request_id"])
        if not all(event.get("result") for event in events):
            return None
        if told and outcome.of(events) is None and outcome.failure(events) is None:
            return None
        return events

    events: list[dict[str, Any]] = cloud.wait_for(
        f"the events of the migration of server {server}"
        + (f", among them {outcome.EVENT}" if told else ""),
        complete,
    )
    return events

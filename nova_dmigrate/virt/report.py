# SPDX-License-Identifier: Apache-2.0
"""Tells how a migration went, where operators of Nova look: the log, the history, the server's
actions, the notifications.
"""

import logging
from datetime import datetime, timezone
from typing import Any

from nova import objects, rpc, utils
from oslo_config import cfg

from nova_dmigrate.migration import history
from nova_dmigrate.migration.summary import COMPLETED, MigrationSummary

LOG = logging.getLogger(__name__)

#: Name of the event of the server's action ``live-migration``.
EVENT = "compute_dmigrate"
NOTIFICATION = "dmigrate.migration.end"
#: What Nova's database holds.
_DETAILS = 255


def tell(context: Any, host: str, config: cfg.ConfigOpts | None, summary: MigrationSummary) -> None:
    """Tell all who may want to know. What of it fails is in the log; the migration is over.

    :param host: the host that tells it.
    :param config: nova-dmigrate's own; None if there is none.
    """
    level = logging.INFO if summary.state == COMPLETED else logging.ERROR
    LOG.log(level, "Instance %s: %s", summary.instance, summary.sentence())
    if config is not None:
        history.keep(summary, config)
    try:
        _note_event(context, host, summary)
    except Exception as error:  # noqa: BLE001 - the action may be gone, or the conductor
        LOG.warning("Instance %s: no event of its action: %s", summary.instance, error)
    try:
        _notify(context, host, summary)
    except Exception as error:  # noqa: BLE001 - whatever the driver of notifications raises
        LOG.warning("Instance %s: no notification: %s", summary.instance, error)


def _note_event(context: Any, host: str, summary: MigrationSummary) -> None:
    event = objects.InstanceActionEvent(
        context=context,
        event=EVENT,
        host=host,
        start_time=datetime.now(timezone.utc),
        details=utils.safe_truncate(summary.sentence(), _DETAILS),
    )
    event.create(summary.instance, context.request_id)
    if summary.state == COMPLETED:
        objects.InstanceActionEvent.event_finish(
            context, summary.instance, EVENT, want_result=False
        )
    else:
        objects.InstanceActionEvent.event_finish_with_failure(
            context,
            summary.instance,
            EVENT,
            exc_val=summary.sentence(),
            exc_tb="",
            want_result=False,
        )


def _notify(context: Any, host: str, summary: MigrationSummary) -> None:
    payload = summary.to_dict()
    # Rows of a whole migration are for the history
    del payload["series"]
    # Of the two formats Nova sends what the operator has chosen, each under topics of its own
    for notifier in (rpc.LEGACY_NOTIFIER, rpc.NOTIFIER):
        notifier.prepare(publisher_id=f"compute.{host}").info(context, NOTIFICATION, payload)

# SPDX-License-Identifier: Apache-2.0
"""The commands that migrate, and that tell whether a migration would do well."""

import argparse
import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.cmd.cli import progress
from nova_dmigrate.cmd.cli.display import (
    FINDING_COLUMNS,
    SUMMARY_COLUMNS,
    CheckedLister,
    CheckedShowOne,
    cells,
    finding_cells,
)
from nova_dmigrate.findings import Severity
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.migration.summary import COMPLETED

_MIB = 1 << 20


class Migrate(CheckedShowOne):
    """Migrate a running domain, through the relays where that is possible.

    Whatever stands in the way of that makes the migration the ordinary one, or one without the
    volumes, unless --mode says otherwise; the result tells why. Ctrl-C, SIGTERM or SIGHUP (the
    terminal is gone) cancels it: the guest stays where it is.
    """

    COLUMNS = SUMMARY_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="DOMAIN", type=_text, help="name or UUID")
        parser.add_argument(
            "destination_uri",
            metavar="DESTURI",
            type=_text,
            help="libvirt at the destination, as the source reaches it: qemu+tls://compute2/system",
        )
        _add_common(parser)
        parser.add_argument(
            "--mode",
            choices=[mode.value for mode in Mode],
            default=Mode.AUTO.value,
            help="through the relays if possible (auto, the default), or else not at all"
            " (required), or never (ordinary)",
        )
        parser.add_argument(
            "--max-downtime",
            type=_milliseconds,
            metavar="MS",
            help="milliseconds for which the guest may pause at the switchover, 1 at least"
            " (default: [migration]max_downtime)",
        )
        parser.add_argument(
            "--bandwidth",
            type=_amount,
            default=0,
            metavar="MiB/s",
            help="the most that the migration takes of the network; 0, the default, for no cap",
        )
        parser.add_argument(
            "--volume-bandwidth",
            type=_amount,
            default=0,
            metavar="MiB/s",
            help="the most that the destination reads from volumes; 0, the default, for no cap",
        )
        parser.add_argument(
            "--wait",
            type=_amount,
            metavar="SECONDS",
            help="how long to wait for a free relay before the migration is the ordinary one",
        )
        parser.add_argument(
            "--auto-converge",
            action="store_true",
            help="let QEMU slow a guest down that changes its memory too quickly",
        )
        parser.add_argument(
            "--post-copy",
            action="store_true",
            help="allow a switch to post-copy; what follows it goes through the relays unchanged",
        )
        parser.add_argument(
            "--tls",
            action="store_true",
            help="have QEMU encrypt an ordinary migration; between relays [wire]tls decides",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        """Migrate; the summary."""
        config = self.app.configuration()
        service = _service(config)
        request = MigrationRequest(
            **_common(parsed_args, config),
            mode=Mode(parsed_args.mode),
            max_downtime_ms=parsed_args.max_downtime,
            network_bandwidth=round(parsed_args.bandwidth * _MIB),
            volume_bandwidth=round(parsed_args.volume_bandwidth * _MIB),
            wait_seconds=parsed_args.wait,
            auto_converge=parsed_args.auto_converge,
            post_copy=parsed_args.post_copy,
            tls=parsed_args.tls,
        )
        with (
            progress.shown(request.domain, self.app.stderr, self.app.quiet) as on_progress,
            _cancelled_by_signals() as cancelled,
        ):
            summary = service.migrate(request, config, on_progress, cancelled)
        if not self.app.quiet:
            print(summary.sentence(), file=self.app.stderr, flush=True)
        self.status = 0 if summary.state == COMPLETED else 1
        return SUMMARY_COLUMNS, cells(summary, SUMMARY_COLUMNS)


class Check(CheckedLister):
    """Tell, finding by finding, whether this host, a domain and a destination are ready.

    Nothing is changed. Without a domain the host alone is looked at. The exit status is 1 if there
    is a problem.
    """

    COLUMNS = FINDING_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The arguments."""
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="DOMAIN", nargs="?", default="", help="name or UUID")
        parser.add_argument(
            "destination_uri",
            metavar="DESTURI",
            nargs="?",
            default="",
            help="libvirt at the destination",
        )
        _add_common(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        """Check; the findings."""
        config = self.app.configuration()
        request = MigrationRequest(**_common(parsed_args, config))
        found = _service(config).check(request, config)
        self.status = 1 if any(each.severity is Severity.PROBLEM for each in found) else 0
        return FINDING_COLUMNS, [finding_cells(each) for each in found]


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect",
        metavar="URI",
        default=os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system"),
        help="libvirt at the source (default: $LIBVIRT_DEFAULT_URI, or qemu:///system)",
    )
    parser.add_argument(
        "--agent",
        choices=[each.value for each in AgentTransport],
        help="how the agent in the guest is asked (default: [migration]agent_transport)",
    )
    parser.add_argument(
        "--instance",
        metavar="UUID",
        help="by which the agent knows its guest (default: the domain's)",
    )
    parser.add_argument(
        "--source-host",
        metavar="NAME",
        help="the host service at the source (default: this host's)",
    )
    parser.add_argument(
        "--destination-host",
        metavar="NAME",
        help="the host service at the destination (default: the host in DESTURI)",
    )
    parser.add_argument(
        "--migration-address",
        metavar="ADDRESS",
        help="the destination's address in the migration network (default: what its service says)",
    )


def _common(parsed_args: argparse.Namespace, config: cfg.ConfigOpts) -> dict[str, Any]:
    return {
        "domain": parsed_args.domain,
        "destination_uri": parsed_args.destination_uri,
        "connect_uri": parsed_args.connect,
        "instance": parsed_args.instance,
        "agent_transport": AgentTransport(parsed_args.agent or config.migration.agent_transport),
        "source_host": parsed_args.source_host,
        "destination_host": parsed_args.destination_host,
        "migration_address": parsed_args.migration_address,
    }


def _service(config: cfg.ConfigOpts) -> ModuleType:
    """The orchestration, with what it needs of the configuration.

    :raises ConfigurationError: libvirt-python or oslo.messaging is not installed: the commands that
        look at the past do without.
    """
    with warnings.catch_warnings():
        # What oslo.messaging imports warns of eventlet, which nothing here uses
        warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")
        try:
            from nova_dmigrate.migration import service
            from nova_dmigrate.rpc import broker
        except ImportError as error:
            raise exception.ConfigurationError(
                reason=f"the extra 'host' is not installed: {error}"
            ) from error
    broker.set_defaults(config)
    return service


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set. The orchestration then puts everything back,
    for which it must not be interrupted."""
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Started by nohup, it goes on when the terminal is gone
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, lambda *_: cancelled.set()) for number in numbers]
    try:
        yield cancelled
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _milliseconds(text: str) -> int:
    number = int(text)
    if number < 1:
        # QEMU would wait for a guest that changes nothing at all; and 0 elsewhere means "as it is"
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no amount")
    return number

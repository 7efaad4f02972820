# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-agent: the agent in the guest, and what its operator can ask it.

``serve`` answers the hosts. ``check`` tells whether a migration would profit, and what is
missing. ``map --summary`` makes a buffer map and tells what is in it. ``restore`` puts back what
an agent that is gone has left changed. ``warm-up`` fills the buffer pools from the lists of hot
pages. ``grants`` prints the statements that make the SQL user.

Exit status: 0 all is well, 1 something is missing or failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_log import log

from nova_dmigrate import conf, exception, version
from nova_dmigrate.buffermap import PAGE_SIZE, save_parts
from nova_dmigrate.cmd import extras
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.dispatcher import Dispatcher

PROGRAM = "nova-dmigrate-agent"

with extras.needed(PROGRAM, "agent"):
    from nova_dmigrate.agent import (
        database,
        describe,
        hot_pages,
        hotlist_keeper,
        options,
        processes,
        service,
    )
    from nova_dmigrate.agent.preparation import PreparationSettings

LOG = log.getLogger(__name__)

_WELL, _TROUBLE, _WRONG_USAGE = 0, 1, 2
_MIB = 1 << 20
_FOLLOW_SECONDS = 0.5
_MAX_PASSWORD = 4096
_DMI_UUID = Path("/sys/class/dmi/id/product_uuid")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?(-.*)?")
_VERSION_MEANT = (8, 0, 0)  # without --version
_MARKS = {Severity.OK: "ok", Severity.NOTE: "note", Severity.PROBLEM: "PROBLEM"}


def _add_commands(commands: Any) -> None:
    commands.add_parser("serve", help="answer the requests of the hosts")
    check = commands.add_parser("check", help="tell what is missing for a quick migration")
    check.add_argument("--json", action="store_true", help="for programs")
    check.add_argument("--no-map", action="store_true", help="do not make a map to see its share")
    made = commands.add_parser("map", help="make a buffer map")
    made.add_argument("--summary", action="store_true", help="tell what is in it (the default)")
    made.add_argument("--json", action="store_true", help="tell it for programs")
    made.add_argument("--output", metavar="FILE", help="write the map to a file")
    commands.add_parser("restore", help="put back settings that a dead agent has left changed")
    warm_up = commands.add_parser("warm-up", help="fill the buffer pools, hottest pages first")
    warm_up.add_argument("--json", action="store_true", help="tell the outcome for programs")
    grants = commands.add_parser("grants", help="print the statements that make the SQL user")
    grants.add_argument("--flavour", choices=["mysql", "mariadb"], help="else the running server's")
    grants.add_argument("--version", type=_version, help="of --flavour, e.g. 5.7 (default 8.0)")


def _version(text: str) -> tuple[int, int, int]:
    if not _VERSION.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version such as 5.7 or 10.11.6")
    return database.parse_version(text)[1]


def make_config(arguments: list[str], files: list[str] | None = None) -> cfg.ConfigOpts:
    """The configuration of this guest, with the command in ``config.command.name``."""
    config = cfg.ConfigOpts()
    conf.register_opts(config)
    config.register_cli_opt(cfg.SubCommandOpt("command", title="commands", handler=_add_commands))
    log.register_options(config)
    config(
        arguments,
        project="nova-dmigrate",
        prog=PROGRAM,
        version=version.version_string(),
        default_config_files=files,
    )
    return config


def settings_from(config: cfg.ConfigOpts) -> service.AgentSettings:
    """The options in the units that the agent uses.

    :raises ConfigurationError: if the file with the password cannot be read.
    """
    agent = config.agent
    return service.AgentSettings(
        state_directory=Path(agent.state_directory),
        selector=processes.Selector(
            datadir=agent.datadir or None,
            socket=agent.socket or None,
            users=tuple(agent.server_users),
        ),
        login=database.Login(
            socket="",
            user=agent.sql_user,
            password=_read_password(agent.sql_password_file),
            timeout=agent.sql_timeout,
        ),
        preparation=PreparationSettings(
            max_flush_bytes=agent.max_flush_rate * _MIB,
            max_lease_seconds=agent.max_lease,
            max_seconds=agent.max_preparation,
        ),
        mapping=options.MapOptions(
            volume_names=dict(agent.volume_names),
            cpu_share=agent.map_cpu_share,
            time_limit=agent.map_time_limit,
        ),
        hot_pages=hot_pages.HotPagesSettings(
            lists=hotlist_keeper.ListSettings(
                interval=agent.hot_list_interval, share=agent.hot_list_share
            ),
            warm_up_rate=agent.warm_up_rate * _MIB,
        ),
    )


def instance_of(config: cfg.ConfigOpts) -> str:
    """UUID of this instance.

    :raises ConfigurationError: if it is neither configured nor in the firmware's tables.
    """
    text = config.agent.instance
    try:
        return str(uuid.UUID(text or _DMI_UUID.read_text(encoding="ascii").strip()))
    except (OSError, ValueError) as error:
        raise exception.ConfigurationError(
            reason=f"[agent]instance is not set, or no UUID, and DMI does not tell it: {error}"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        config = make_config(sys.argv[1:] if arguments is None else arguments)
        settings = settings_from(config)
        command = config.command
        if command.name == "grants":
            return _grants(settings, command)
        _set_up_logging(config, quiet=command.name != "serve")
        if command.name == "serve":
            return _serve(config, settings)
        commands = {"check": _check, "map": _map, "restore": _restore, "warm-up": _warm_up}
        return commands[command.name](settings, command)
    except (cfg.Error, exception.ConfigurationError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _WRONG_USAGE
    except SystemExit as error:
        # argparse has told what is wrong, or printed its help
        return error.code if isinstance(error.code, int) else _WRONG_USAGE
    except (exception.DMigrateError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _TROUBLE


def _set_up_logging(config: cfg.ConfigOpts, quiet: bool) -> None:
    if not (config.log_file or config.log_dir or config.use_journal):
        config.set_override("use_stderr", True)
    log.setup(config, "nova-dmigrate")
    if quiet and not config.debug:
        logging.getLogger().setLevel(logging.WARNING)


def _serve(config: cfg.ConfigOpts, settings: service.AgentSettings) -> int:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    instance = instance_of(config)

    def make_server(dispatcher: Dispatcher) -> service.RequestServer:
        if config.agent.transport == "channel":
            from nova_dmigrate.rpc import channel

            path = config.agent.channel_path
            return channel.ChannelServer(dispatcher, lambda: channel.open_port(path))
        # The other commands, and the channel, do without oslo.messaging
        with extras.needed(PROGRAM, "agent"):
            from nova_dmigrate.rpc import broker

        broker.set_defaults(config)
        return broker.BrokerServer(instance, dispatcher, config)

    LOG.info("%s %s for instance %s", PROGRAM, version.version_string(), instance)
    service.run(settings, make_server, stopped)
    return _WELL


def _check(settings: service.AgentSettings, command: Any) -> int:
    servers = service.Servers(settings)
    inspection = describe.inspect(servers.find, servers.login)
    found = [*service.make_preparation(settings).findings(), *inspection.findings]
    mapped = None
    if not command.no_map:
        try:
            built = servers.build_map()
            built.run()
            mapped = sum(built.pages.values()) * PAGE_SIZE / max(1, inspection.memory_bytes)
            found += built.findings
        except exception.DMigrateError as error:
            found.append(Finding("no-map", Severity.PROBLEM, str(error)))
    found = list(dict.fromkeys(found))
    if command.json:
        _print_json(
            {
                "mapped_share": mapped,
                "expected_share": inspection.expected_share,
                "servers": [vars(each) for each in inspection.servers],
                "findings": [_as_dict(each) for each in found],
            }
        )
    else:
        for server in inspection.servers:
            print(
                f"{server.flavour} {server.server_version} in {server.name}: pool "
                f"{server.pool_bytes / _MIB:.0f} MiB, {server.filled_share:.0%} filled, "
                f"{server.dirty_share:.1%} of that dirty"
            )
        if mapped is not None:
            print(f"{mapped:.0%} of the guest's memory can be read from its volumes")
        _print_findings(found)
    return _status(found)


def _map(settings: service.AgentSettings, command: Any) -> int:
    servers = service.Servers(settings)
    built = servers.build_map()
    if command.output:
        save_parts(built, command.output)
    else:
        built.run()
    pages = sum(built.pages.values())
    if command.json:
        _print_json(
            {
                "pages": pages,
                "volumes": built.pages,
                "findings": [_as_dict(each) for each in built.findings],
            }
        )
        return _status(built.findings)
    print(f"{pages} guest pages ({pages * PAGE_SIZE / _MIB:.0f} MiB) are mapped")
    for name, count in built.pages.items():
        print(f"volume {name}: {count} guest pages")
    _print_findings(built.findings)
    return _status(built.findings)


def _restore(settings: service.AgentSettings, command: Any) -> int:
    with service.exclusive(settings.state_directory):
        preparation = service.make_preparation(settings)
        preparation.recover()
        state = preparation.restore()
        left = service.make_hot_pages(settings).recover()
    print(state.message)
    if left is not None:
        print(f"settings for the hot pages cannot be put back now: {left}")
    return _WELL if state.state == "idle" and left is None else _TROUBLE


def _warm_up(settings: service.AgentSettings, command: Any) -> int:
    try:
        with service.exclusive(settings.state_directory):
            pages = service.make_hot_pages(settings)
            pages.start()
            try:
                pages.warm_up()
                state = _follow(pages.warm_up_state, quiet=command.json)
            finally:
                pages.stop()
    except exception.AgentError as error:
        if error.kwargs.get("code") != "running":
            raise
        directory = settings.state_directory
        hot_pages.ask_running_agent(directory)
        state = _follow(lambda: hot_pages.running_agents_state(directory), quiet=command.json)
    if command.json:
        _print_json(vars(state))
    elif state.state == "done":
        print(f"{state.loaded} pages are in memory, {state.seconds:.1f} s")
        if state.message:
            print(state.message)
    else:
        print(f"{PROGRAM}: {state.state}: {state.message}", file=sys.stderr)
    return _WELL if state.state == "done" else _TROUBLE


def _follow(ask: Callable[[], messages.WarmUpState | None], quiet: bool) -> messages.WarmUpState:
    """Wait for the end of a warm-up, and print how far it is."""
    told = None
    while True:
        state = ask()
        if state is not None and state.state not in ("idle", *messages.WARM_UP_UNFINISHED):
            return state
        if state is not None and not quiet:
            line = f"{state.state}: {state.loaded} of {state.total} pages"
            if line != told:
                print(line, flush=True)
            told = line
        time.sleep(_FOLLOW_SECONDS)


def _grants(settings: service.AgentSettings, command: Any) -> int:
    flavour, number = command.flavour, command.version or _VERSION_MEANT
    if flavour is None:
        if command.version is not None:
            print(f"{PROGRAM} grants: --version is of use with --flavour alone", file=sys.stderr)
            return _WRONG_USAGE
        flavour, number = _ask_version(service.Servers(settings))
    for statement in database.grants(flavour, number, settings.login.user):
        print(statement + ";")
    return _WELL


def _ask_version(servers: service.Servers) -> tuple[str, tuple[int, int, int]]:
    """Flavour and version of the first server that tells them, to whoever connects."""
    reasons = []
    for login in servers.logins():
        try:
            return database.greet(login)
        except exception.ServerError as error:
            reasons.append(str(error))
    raise exception.AgentError(
        reason=f"no server tells its version ({'; '.join(reasons) or 'none has a socket'}): "
        "name it with --flavour and --version",
        code="no-version",
    )


def _status(found: Iterable[Finding]) -> int:
    problems = any(each.severity is Severity.PROBLEM for each in found)
    return _TROUBLE if problems else _WELL


def _print_findings(found: Iterable[Finding]) -> None:
    for each in found:
        print(f"{_MARKS[each.severity]}: {each.message} [{each.code}]")


def _read_password(name: str) -> str:
    if not name:
        return ""
    try:
        with open(name, encoding="utf-8") as file:
            return file.read(_MAX_PASSWORD).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise exception.ConfigurationError(
            reason=f"[agent]sql_password_file cannot be read: {error}"
        ) from error


def _as_dict(found: Finding) -> dict[str, str]:
    return {"code": found.code, "severity": found.severity.value, "message": found.message}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())

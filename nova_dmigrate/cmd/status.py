# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-status: is this host ready for an upgrade, and has one gone well?

``nova-dmigrate-status upgrade check`` looks at a compute host before its services are started anew,
and afterwards. Nothing is changed.

Exit status: 0 all is well, 1 a warning, 2 a failure or wrong usage, 255 an error in the checks.
"""

import argparse
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from oslo_config import cfg

from nova_dmigrate import exception, version
from nova_dmigrate.cmd import extras

PROGRAM = "nova-dmigrate-status"

with warnings.catch_warnings(), extras.needed(PROGRAM, "host"):
    # What oslo.messaging imports warns of eventlet, which nothing here uses
    warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")
    from oslo_upgradecheck import upgradecheck

    from nova_dmigrate.cmd.checks import configuration, hypervisor, nova, services
    from nova_dmigrate.cmd.checks.base import CheckedHost, warning

OPTIONS = [
    cfg.MultiStrOpt(
        "peer",
        default=[],
        metavar="NAME",
        help="Another host whose service is asked whether migrations to it can go through relays."
        " Can be repeated.",
    ),
    cfg.MultiStrOpt(
        "nova-config-file",
        default=[],
        metavar="PATH",
        help="Nova's configuration, instead of the files that nova-compute reads by default. Can"
        " be repeated.",
    ),
    cfg.StrOpt(
        "connect",
        metavar="URI",
        help="libvirt of this host, instead of [host]libvirt_uri.",
    ),
]

_Check = Callable[[CheckedHost], upgradecheck.Result]


class Commands(upgradecheck.UpgradeCommands):
    """The checks, for a host that is known when the command line is.

    :param own_files: arguments that name configuration files.
    """

    display_title = "nova-dmigrate: upgrade check"

    def __init__(self, command_line: cfg.ConfigOpts, own_files: Sequence[str]) -> None:
        super().__init__()
        self._command_line = command_line
        self._own_files = own_files

    @functools.cached_property
    def host(self) -> CheckedHost:
        """What is checked."""
        said = self._command_line
        return CheckedHost(self._own_files, said.nova_config_file, said.peer, said.connect)

    @staticmethod
    def _of(check: _Check) -> Callable[["Commands"], upgradecheck.Result]:
        def run(commands: "Commands") -> upgradecheck.Result:
            try:
                return check(commands.host)
            except exception.ConfigurationError as error:
                return warning(f"Not checked. {error}")

        return run

    _upgrade_checks = (
        ("Configuration", _of(configuration.options)),
        ("Certificates", _of(configuration.certificates)),
        ("History of migrations", _of(configuration.history)),
        ("Host service", _of(services.own)),
        ("Other hosts", _of(services.others)),
        ("libvirt and QEMU", _of(hypervisor.versions)),
        ("Release of Nova", _of(nova.release)),
        ("Driver of Nova", _of(nova.driver)),
        ("Configuration of Nova", _of(nova.own_options)),
        ("Directories of Nova", _of(nova.directories)),
    )


class _CommandLine(cfg.ConfigOpts):
    """The command line alone: configuration files are read by a check, which tells what is wrong
    with them.
    """

    def __call__(self, args: Any = None, *_: Any, **__: Any) -> None:
        super().__call__(
            args,
            prog=PROGRAM,
            version=version.version_string(),
            description=(__doc__ or "").splitlines()[0],
            default_config_files=[],
            default_config_dirs=[],
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    own_files, rest = _split(sys.argv[1:] if arguments is None else arguments)
    # What goes wrong is told by the checks, once and in words
    logging.getLogger().addHandler(logging.NullHandler())
    command_line = _CommandLine()
    command_line.register_cli_opts(OPTIONS)
    commands = Commands(command_line, own_files)
    return upgradecheck.main(command_line, PROGRAM, commands, rest)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that name configuration files, and the others."""
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    for option in ("--config-file", "--config-dir"):
        parser.add_argument(option, action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    files = [f"--config-file={path}" for path in known.config_file]
    return [*files, *(f"--config-dir={path}" for path in known.config_dir)], rest


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The program as cliff knows it: options of all commands, logging, configuration, streams."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager
from oslo_config import cfg

from nova_dmigrate import conf, version
from nova_dmigrate.rpc import calm

PROGRAM = "nova-dmigrate"
WRONG_USAGE = 2
_LEVELS = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)


class UsageError(Exception):
    """The command line makes no sense."""


class CommandLine(App):
    """The program, without cliff's interactive mode.

    :ivar error: what the command ended with; None if all was well.
    """

    NAME = PROGRAM

    def __init__(
        self, description: str, commands: Mapping[str, type[Command]], **streams: Any
    ) -> None:
        """Make the program; ``streams`` stand for the process's own (``stdout=...``)."""
        manager = CommandManager("nova_dmigrate.cli")
        for name, command in commands.items():
            manager.add_command(name, command)
        super().__init__(
            description,
            version.version_string(),
            manager,
            deferred_help=True,  # "COMMAND --help" is about the command
            **streams,
        )
        self.error: BaseException | None = None

    def build_option_parser(
        self,
        description: str | None,
        version: str | None,
        argparse_kwargs: dict[str, Any] | None = None,
    ) -> argparse.ArgumentParser:
        """cliff's options, and where the configuration is."""
        parser: argparse.ArgumentParser = super().build_option_parser(
            description, version, {"prog": PROGRAM, **(argparse_kwargs or {})}
        )
        parser.add_argument(
            "--config-file",
            action="append",
            metavar="FILE",
            help="configuration file, instead of /etc/nova-dmigrate/nova-dmigrate.conf;"
            " can be repeated",
        )
        return parser

    def configure_logging(self) -> None:
        """Log to standard error: warnings, with -v what is done, with -vv everything.

        What is done is told by the display of a migration already, so cliff's own default would
        tell it twice.
        """
        root = logging.getLogger()
        root.setLevel(logging.DEBUG)
        console = logging.StreamHandler(self.stderr)
        console.setLevel(_LEVELS[min(self.options.verbose_level, len(_LEVELS) - 1)])
        console.setFormatter(logging.Formatter(self.CONSOLE_MESSAGE_FORMAT))
        root.addHandler(console)
        if self.options.log_file:
            file = logging.FileHandler(self.options.log_file)
            file.setFormatter(logging.Formatter(self.LOG_FILE_MESSAGE_FORMAT))
            root.addHandler(file)
        calm.calm()

    @property
    def quiet(self) -> bool:
        """Whether nothing but errors is to be told besides the result."""
        return bool(self.options.verbose_level == 0)

    def configuration(self) -> cfg.ConfigOpts:
        """The host's configuration.

        :raises cfg.Error: a file cannot be read, or an option is wrong.
        """
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        files = self.options.config_file
        config([], project=PROGRAM, prog=PROGRAM, default_config_files=files)
        return config

    def interact(self) -> NoReturn:
        """Without a command: usage, instead of a shell."""
        self.parser.print_usage(self.stderr)
        names = ", ".join(sorted(name for name, _ in self.command_manager))
        print(f"{PROGRAM}: which command? {names}", file=self.stderr)
        raise SystemExit(WRONG_USAGE)

    def clean_up(self, cmd: Command, result: int, err: BaseException | None) -> None:
        """Keep what the command ended with."""
        self.error = err

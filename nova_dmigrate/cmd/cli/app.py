# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate: migrate a domain, check whether one can, look at the migrations that have been.

Standard output has the result, as a table, JSON, YAML and so on; standard error what goes on.

Exit status: 0 all is well (migrated, also in the ordinary way), 1 it failed or something is
missing, 2 wrong usage or configuration.
"""

import sys
from typing import Any

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.cmd import extras

with extras.needed("nova-dmigrate", "host"):
    from cliff.command import Command

    from nova_dmigrate.cmd.cli.base import WRONG_USAGE, CommandLine, UsageError
    from nova_dmigrate.cmd.cli.history import History, Report, Show
    from nova_dmigrate.cmd.cli.migrate import Check, Migrate

_COMMANDS: dict[str, type[Command]] = {
    "migrate": Migrate,
    "check": Check,
    "history": History,
    "show": Show,
    "report": Report,
}


def main(arguments: list[str] | None = None, **streams: Any) -> int:
    """Run one command; returns the exit status.

    :param streams: ``stdin``, ``stdout``, ``stderr`` instead of the process's own.
    """
    app = CommandLine((__doc__ or "").splitlines()[0], _COMMANDS, **streams)
    try:
        status = int(app.run(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as error:  # argparse has told what is wrong, or printed its help
        return WRONG_USAGE if error.code else 0
    if isinstance(app.error, (UsageError, cfg.Error, exception.ConfigurationError)):
        return WRONG_USAGE
    return status


if __name__ == "__main__":
    sys.exit(main())

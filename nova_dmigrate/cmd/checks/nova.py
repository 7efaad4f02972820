# SPDX-License-Identifier: Apache-2.0
"""Nova on this host: its release, its driver, and what its configuration says of ours.

Nova is not imported: these checks run where there is none, and tell so.
"""

import contextlib
import importlib.util
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Result

from nova_dmigrate import exception
from nova_dmigrate.cmd.checks.base import CheckedHost, failure, warning, well
from nova_dmigrate.conf import nova as options
from nova_dmigrate.migration import peers
from nova_dmigrate.virt import configuration
from nova_dmigrate.virt.configuration import COMPUTE_DRIVER, NEWEST_NOVA, OLDEST_NOVA

_NO_NOVA = "There is no Nova: neither a nova.conf, nor the package in this Python environment"


def release(host: CheckedHost) -> Result:
    """The driver is for this Nova."""
    if host.nova_version is None:
        if _has_driver(host):
            return warning(
                f"nova.conf has our driver, but there is no Nova in {sys.prefix}: nova-dmigrate"
                " belongs in the Python environment of nova-compute, with its"
                " nova-dmigrate-status"
            )
        return well(_NO_NOVA if host.nova is None else f"There is no Nova in {sys.prefix}")
    version = host.nova_version
    major = int(version.partition(".")[0])
    if major < OLDEST_NOVA:
        return failure(f"Nova {version} is too old: the driver is for {OLDEST_NOVA} and later")
    if major > NEWEST_NOVA:
        return warning(f"Nova {version} is newer than any that was tried, {NEWEST_NOVA} the latest")
    return well(f"Nova {version} is one that the driver is for")


def driver(host: CheckedHost) -> Result:
    """Nova loads our driver."""
    if host.nova is None:
        return well(_NO_NOVA)
    if not _has_driver(host):
        return warning(
            f"[DEFAULT]compute_driver of nova.conf is {host.nova.compute_driver or 'not set'}, not"
            f" {COMPUTE_DRIVER}: live migrations of this host's servers are Nova's own"
        )
    if host.nova_version is not None:
        module = f"nova.virt.{COMPUTE_DRIVER.rpartition('.')[0]}"
        if importlib.util.find_spec(module) is None:
            return failure(f"Nova does not find {COMPUTE_DRIVER}: there is no {module}")
    return well(f"[DEFAULT]compute_driver of nova.conf is {COMPUTE_DRIVER}")


def own_options(host: CheckedHost) -> Result:
    """``[dmigrate]`` of nova.conf can be used, and leads to this host's service."""
    if host.nova is None:
        return well(_NO_NOVA)
    try:
        for option in options.OPTIONS:
            getattr(host.nova.dmigrate, option.dest)
    except (cfg.Error, ValueError) as error:
        return failure(f"[dmigrate] of nova.conf: {error}")
    try:
        ours = configuration.load(host.nova)
    except exception.ConfigurationError as error:
        return failure(f"[dmigrate]config_file of nova.conf: {error}")
    if _has_driver(host):
        if host.nova.host != host.name:
            return failure(
                f"The driver asks for the service of host {host.nova.host} ([DEFAULT]host of"
                f" nova.conf), which calls itself {host.name} ([host]name)"
            )
        if ours.transport_url != host.config.transport_url:
            # They have passwords in them
            return failure(
                "The driver asks at another broker or virtual host, see [dmigrate]config_file of"
                " nova.conf, than the host service answers at, see [DEFAULT]transport_url"
            )
    return well(f"[dmigrate]default_policy of nova.conf is {host.nova.dmigrate.default_policy}")


def directories(host: CheckedHost) -> Result:
    """nova-compute reads our configuration, and writes where it has to.

    Its user is the owner of ``[DEFAULT]state_path`` of nova.conf.
    """
    if host.nova is None:
        return well(_NO_NOVA)
    if not _has_driver(host):
        return well("nova-compute does not have our driver: it needs no directories of ours")
    try:
        ours = configuration.load(host.nova)
    except exception.ConfigurationError:
        return warning("Not checked. [dmigrate]config_file of nova.conf cannot be used")
    try:
        user = os.stat(host.nova.state_path).st_uid
    except (OSError, cfg.Error) as error:
        return warning(
            f"Not checked. Whose nova-compute is, is not known: [DEFAULT]state_path of nova.conf:"
            f" {error}"
        )
    if os.geteuid() not in (0, user):
        return warning(f"Not checked. It takes root to see what user {user} may do")
    for path in (*_configurations(host.nova, ours), *map(Path, _broker_files(ours))):
        if not _may(user, "-r", path) or (path.is_dir() and not _may(user, "-x", path)):
            return failure(f"nova-compute, as user {user}, cannot read {path}")
    maps = peers.settings_from(ours).state_directory
    past = Path(ours.migration.history_directory)
    for option, directory, without in (
        ("[host]state_directory", maps, "migrations are ordinary ones"),
        ("[migration]history_directory", past, "migrations are not remembered"),
    ):
        # What is missing is made when it is wanted
        there = next(each for each in (directory, *directory.parents) if os.path.exists(each))
        if not _may(user, "-w", there) or not _may(user, "-x", there):
            return failure(
                f"{option}: nova-compute, as user {user}, cannot write to {directory}: {without}"
            )
    return well(f"nova-compute, as user {user}, can write to {maps} and {past}")


def _configurations(nova: cfg.ConfigOpts, ours: cfg.ConfigOpts) -> list[Path]:
    """Our files that nova-compute reads, and the directories that some of them are in."""
    directories = [Path(path) for path in configuration.directories(nova)]
    beside = [each for directory in directories for each in sorted(directory.glob("*.conf"))]
    return [*map(Path, ours.config_file), *directories, *beside]


def _broker_files(config: cfg.ConfigOpts) -> list[str]:
    """With which nova-compute connects to the broker."""
    rabbit = config.oslo_messaging_rabbit
    files = (rabbit.ssl_ca_file, rabbit.ssl_cert_file, rabbit.ssl_key_file)
    return [path for path in files if rabbit.ssl and path]


def _may(user: int, what: str, path: Path) -> bool:
    """Whether a user may do what ``test`` has that letter for."""
    identity: dict[str, Any] = {}
    if user != os.geteuid():
        identity = {"user": user, "group": user, "extra_groups": []}
        with contextlib.suppress(KeyError):  # in a container it may have no name
            entry = pwd.getpwuid(user)
            identity["group"] = entry.pw_gid
            identity["extra_groups"] = os.getgrouplist(entry.pw_name, entry.pw_gid)
    done = subprocess.run(["test", what, str(path)], check=False, cwd="/", **identity)
    return done.returncode == 0


def _has_driver(host: CheckedHost) -> bool:
    return host.nova is not None and host.nova.compute_driver == COMPUTE_DRIVER

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Virtual hosts and users of a devstack at RabbitMQ, one for each guest.

    broker_credentials.py add UUID --broker HOST    prints the guest's own part of the configuration
    broker_credentials.py remove UUID
    broker_credentials.py services                  for the host services
    broker_credentials.py remove-all                of the host services, and of all guests

Adding what is there gives it a new password. ``DMIGRATE_RABBITMQCTL`` in the environment is the
command that rabbitmqctl is called by, ``DMIGRATE_BROKER_PASSWORD`` the password of the hosts' user.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys

from nova_dmigrate.rpc import isolation

_RABBITMQCTL = "sudo rabbitmqctl"


class ControlError(Exception):
    """rabbitmqctl has failed, and has said why."""


def control(verb: str, *arguments: str) -> str:
    """What rabbitmqctl prints.

    :raises ControlError: it has failed.
    """
    command = [*shlex.split(os.environ.get("DMIGRATE_RABBITMQCTL", _RABBITMQCTL)), "-q", verb]
    shown, password = list(arguments), ""
    if verb in ("add_user", "change_password"):
        # Everybody can see arguments
        password = shown.pop()
    done = subprocess.run(
        [*command, *shown], input=password, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise ControlError(f"{shlex.join([verb, *shown])} has failed with {done.returncode}")
    return done.stdout


def names(kind: str) -> set[str]:
    """Names of the ``vhosts`` or ``users`` that there are."""
    return {line.split("\t")[0] for line in control(f"list_{kind}").splitlines() if line}


def apply(commands: list[list[str]]) -> None:
    """Carry out commands that make virtual hosts and users, some of which may be there."""
    vhosts, users = names("vhosts"), names("users")
    for command in commands:
        verb, *arguments = command
        if verb == "add_vhost" and arguments[0] in vhosts:
            continue
        if verb == "add_user" and arguments[0] in users:
            verb = "change_password"
        control(verb, *arguments)


def add(instance: str, host_user: str, broker: str) -> None:
    password = secrets.token_hex(24)
    apply(isolation.commands(instance, password, host_user))
    user, vhost = isolation.guest_user(instance), isolation.virtual_host(instance)
    print(
        "# /etc/nova-dmigrate/nova-dmigrate-agent.conf.d/instance.conf\n"
        "[DEFAULT]\n"
        f"transport_url = rabbit://{user}:{password}@{broker}/{vhost}"
    )


def services(host_user: str, password: str) -> None:
    apply([["add_user", host_user, password], *isolation.service_commands(host_user)])


def remove(wanted_users: set[str], wanted_vhosts: set[str]) -> None:
    """Remove those of them that there are."""
    for user in sorted(wanted_users & names("users")):
        control("delete_user", user)
    for vhost in sorted(wanted_vhosts & names("vhosts")):
        control("delete_vhost", vhost)


def remove_all(host_user: str) -> None:
    guests = {name for kind in ("users", "vhosts") for name in names(kind) if _is_guest(name)}
    remove(guests | {host_user}, guests | {isolation.SERVICES})


def _is_guest(name: str) -> bool:
    try:
        return isolation.virtual_host(name.removeprefix("dmigrate-")) == name
    except ValueError:
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["add", "remove", "services", "remove-all"])
    parser.add_argument("uuid", nargs="?", help="of the instance, with add and remove")
    parser.add_argument("--host-user", default="nova-dmigrate", help="the hosts' user")
    parser.add_argument("--broker", help="HOST or HOST:PORT by which guests reach the broker")
    options = parser.parse_args(arguments)
    if (options.what in ("add", "remove")) != (options.uuid is not None):
        parser.error("add and remove want the UUID of an instance, the others none")
    try:
        if options.what == "add":
            if not options.broker:
                parser.error("add wants --broker")
            add(options.uuid, options.host_user, options.broker)
        elif options.what == "remove":
            guest = {isolation.virtual_host(options.uuid)}
            remove(guest, guest)
        elif options.what == "services":
            services(options.host_user, os.environ["DMIGRATE_BROKER_PASSWORD"])
        else:
            remove_all(options.host_user)
    except (ControlError, KeyError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

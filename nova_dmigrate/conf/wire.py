# SPDX-License-Identifier: Apache-2.0
"""Options of the connections between the two relays."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "wire",
    title="Wire options",
    help="""
The connections between the source relay and the destination relay. The
destination listens. Each migration has a token of its own, which both sides
prove to know, with and without TLS.
""",
)

OPTIONS: list[cfg.Opt] = [
    cfg.HostAddressOpt(
        "listen_address",
        default="0.0.0.0",
        help="""
Address on which the destination relay waits for the source relay.

Set it to this host's address in the migration network.
""",
    ),
    cfg.PortOpt(
        "port",
        default=0,
        help="""
TCP port on which the destination relay waits for the source relay. 0 takes any
free port; the source is told which.

A fixed port allows one incoming migration at a time.
""",
    ),
    cfg.BoolOpt(
        "tls",
        default=True,
        help="""
Encrypt and authenticate the connections with TLS 1.3, with certificates on
both sides.

Without TLS guest memory crosses the network readable to everyone in between.
""",
    ),
    cfg.StrOpt(
        "ca_file",
        default="/etc/pki/nova-dmigrate/ca-cert.pem",
        help="""
PEM file with the certificates of the authorities that sign the certificates of
all hosts. Used only with ``tls``.
""",
    ),
    cfg.StrOpt(
        "certificate_file",
        default="/etc/pki/nova-dmigrate/cert.pem",
        help="""
PEM file with this host's certificate. Used only with ``tls``.

It must be good for clients and servers, and name this host as the other hosts
know it (subject alternative name): both sides check the other one's name.
""",
    ),
    cfg.StrOpt(
        "key_file",
        default="/etc/pki/nova-dmigrate/key.pem",
        help="""
PEM file with the private key of this host's certificate. Used only with
``tls``.

Only the user that the relays run as may be able to read it.
""",
    ),
    cfg.IntOpt(
        "handshake_timeout",
        default=5,
        min=1,
        max=120,
        help="""
Seconds that a new connection has for its handshake, TLS included, before it is
closed.

Strangers who connect and say nothing are gone after this time; they never keep
the other relay out.
""",
    ),
]

# SPDX-License-Identifier: Apache-2.0
"""How long whoever wants to migrate waits for the services of hosts."""

import socket
import warnings

from oslo_config import cfg

from nova_dmigrate import conf, exception
from tests import base

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.migration import peers
    from nova_dmigrate.rpc import broker


class AskHostTest(base.TestCase):
    def test_that_a_host_says_nothing_is_known_within_its_time(self) -> None:
        silent = socket.create_server(("127.0.0.1", 0))  # accepts, and that is all
        self.addCleanup(silent.close)
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        broker.set_defaults(config)
        config([], project="nova-dmigrate", default_config_files=[])
        port = silent.getsockname()[1]
        config.set_override("transport_url", f"rabbit://u:p@127.0.0.1:{port}/v")
        settings = peers.settings_from(config)
        with peers.host_client("a", config, settings) as client:
            error = self.assertRaises(
                exception.FallBack, peers.ask_host, client, "i", settings.host_timeout
            )
        self.assertEqual("host-unreachable", error.kwargs["code"])
        # What the broker takes to tell is left of the two seconds
        self.assertIn("the broker does not answer within 1.7 s", str(error))
        self.assertLessEqual(1.7 + broker._MOMENT, settings.host_timeout)

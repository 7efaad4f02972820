# SPDX-License-Identifier: Apache-2.0
"""What ``nova-dmigrate-status upgrade check`` looks at, one module for each part of a host.

A check takes the `CheckedHost` and returns a result of oslo.upgradecheck. Each asks what the
services themselves ask: a host that passes is one on which they work. Where a check needs a
configuration that cannot be read it raises ConfigurationError; only `configuration.options` tells
of that as a failure.
"""

# SPDX-License-Identifier: Apache-2.0
"""One live migration from begin to end, over libvirt and the services of both hosts.

Knows nothing of Nova.
"""

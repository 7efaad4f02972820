# SPDX-License-Identifier: Apache-2.0
"""The relays: one at the source, one at the destination, and the wire between them.

Nothing here knows of Nova or libvirt.
"""

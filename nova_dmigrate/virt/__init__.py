# SPDX-License-Identifier: Apache-2.0
"""The Nova driver: libvirt's, with live migrations through the relays where policy says so.

``driver`` is what Nova loads, and as thin as it can be. What it needs of this package to migrate is
imported when the first server asks for it: whatever is amiss there must not keep nova-compute from
its work.
"""

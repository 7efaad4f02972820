# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate: the command line for who uses libvirt without Nova."""

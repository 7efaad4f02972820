# SPDX-License-Identifier: Apache-2.0
"""QEMU's migration stream: what it is made of, a reader and a writer.

Nothing here knows of sockets, volumes or buffer maps. ``reader.StreamParser`` cuts bytes into
``elements``; ``writer.StreamWriter`` is its mirror image; ``format`` holds QEMU's constants and
the reasons for which parsing ends; ``records`` knows RAM records as NumPy arrays.
"""

# SPDX-License-Identifier: Apache-2.0
"""How far it reaches: maps of the largest guests, the evacuation of a cluster. ``make scale``."""

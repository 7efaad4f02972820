# SPDX-License-Identifier: Apache-2.0
"""Tests with whole database guests: minutes each, run by ``make guests``, not by ``make test``."""

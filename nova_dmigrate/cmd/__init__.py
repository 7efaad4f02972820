# SPDX-License-Identifier: Apache-2.0
"""Entry points: they read configuration and command line, and hand plain values down."""

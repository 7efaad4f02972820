# SPDX-License-Identifier: Apache-2.0
"""Measurements: ``python -m tests.bench`` writes bench.json and prints a table."""

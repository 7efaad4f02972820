# SPDX-License-Identifier: Apache-2.0
"""Live migrations in a cloud that there is, by its API: see doc/source/contributor/testing.rst."""

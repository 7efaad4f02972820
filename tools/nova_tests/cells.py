# SPDX-License-Identifier: Apache-2.0
"""Keeps Nova's functional tests from waiting for each other's threads for ever.

Nova's fixture of cells has one lock for the database that is asked: whoever asks one reads it,
whoever changes to another cell writes it. Its tests ask while they hold it for reading, in threads
that they wait for. When a writer comes in between, it waits for the one that holds the lock, which
waits for its thread, which waits behind the writer.
"""

import importlib


def readers_first() -> None:
    """Let who reads not wait behind who is still waiting to write."""
    # The order of imports that Nova's tests need
    importlib.import_module("nova.test")
    fixtures = importlib.import_module("nova.tests.fixtures.nova")
    fixtures.ReaderWriterLock.has_pending_writers = False

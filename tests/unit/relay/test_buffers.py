# SPDX-License-Identifier: Apache-2.0
"""Pooled buffers: bounded, shared by holders, aligned."""

import threading

import numpy as np

from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from tests.base import TestCase


class BufferPoolTest(TestCase):
    def take(self, pool: BufferPool) -> PooledBuffer:
        buffer = pool.take()
        assert buffer is not None
        return buffer

    def test_a_buffer_is_aligned_writable_and_of_the_size_asked_for(self) -> None:
        buffer = self.take(BufferPool(12345, 1))
        self.assertEqual(12345, len(buffer.view))
        buffer.view[0] = 1
        address = np.frombuffer(buffer.view, np.uint8).__array_interface__["data"][0]
        self.assertEqual(0, address % 4096)

    def test_the_buffer_used_last_is_used_next(self) -> None:
        pool = BufferPool(1, 3)
        first, second = self.take(pool), self.take(pool)
        second.release()
        first.release()
        self.assertIs(first, self.take(pool))
        self.assertIs(second, self.take(pool))

    def test_a_buffer_comes_back_with_its_last_holder(self) -> None:
        pool = BufferPool(1, 1)
        buffer = self.take(pool)
        buffer.hold()
        buffer.release()
        thread = threading.Thread(target=pool.take, daemon=True)
        thread.start()
        thread.join(0.01)
        self.assertTrue(thread.is_alive())
        buffer.release()
        thread.join(60)
        self.assertFalse(thread.is_alive())

    def test_there_are_no_more_than_there_may_be(self) -> None:
        pool = BufferPool(1, 2)
        self.assertIsNot(self.take(pool), self.take(pool))
        found: list[PooledBuffer | None] = []
        threads = [
            threading.Thread(target=lambda: found.append(pool.take()), daemon=True)
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        pool.close()
        for thread in threads:
            thread.join(60)
        self.assertEqual([None] * 3, found)

    def test_a_closed_pool_takes_buffers_back_but_gives_none(self) -> None:
        pool = BufferPool(1, 2)
        buffer = self.take(pool)
        pool.close()
        buffer.release()
        self.assertIsNone(pool.take())

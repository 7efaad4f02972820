# SPDX-License-Identifier: Apache-2.0
"""Recording of real QEMU migration streams for tests/corpus."""

# SPDX-License-Identifier: Apache-2.0
"""Live migration of database VMs whose buffer pool is read from the shared volume."""

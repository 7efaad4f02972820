# SPDX-License-Identifier: Apache-2.0
"""Where Nova looks for ``compute_driver = dmigrate.DMigrateDriver``: only names below
``nova.virt`` are drivers to it.
"""

from nova_dmigrate.virt.driver import DMigrateDriver

__all__ = ["DMigrateDriver"]

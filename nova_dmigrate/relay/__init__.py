# SPDX-License-Identifier: Apache-2.0
"""The relays: one at the source, one at the destination, and the wire between them.

Nothing here knows of Nova or libvirt.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the agent alone runs on 3.9
    raise ImportError("The relays of nova-dmigrate need Python 3.10 or later")

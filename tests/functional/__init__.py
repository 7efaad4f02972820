# SPDX-License-Identifier: Apache-2.0
"""The Nova driver in Nova's real services (API, conductor, scheduler, two computes), in process,
over Nova's fake libvirt. The host services and the agent are stand-ins behind real RPC.

As in Nova's own tests ``OS_NOVA_DISABLE_EVENTLET_PATCHING`` chooses between threads (true) and
eventlet.
"""

from pathlib import Path

# Before anything else, because it may have eventlet patch the standard library
import nova.tests.functional  # noqa: F401
import nova.virt

from tools.nova_tests.cells import readers_first

readers_first()

# From an editable install Nova does not find the shim, which a wheel puts into its package
nova.virt.__path__.append(str(Path(__file__).parents[2] / "nova" / "virt"))

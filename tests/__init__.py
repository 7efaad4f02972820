# SPDX-License-Identifier: Apache-2.0
"""The tests. What holds for all of them is set here: how Hypothesis works.

Examples are derived from the test itself, so that a run says the same everywhere, and nothing
depends on how fast the machine is.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "nova-dmigrate",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nova-dmigrate")

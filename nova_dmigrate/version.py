# SPDX-License-Identifier: Apache-2.0
"""The version of the installed package, as pbr derived it from git."""

from importlib import metadata


def version_string() -> str:
    """Return the installed version, or "unknown" for a tree that was never installed."""
    try:
        return metadata.version("nova-dmigrate")
    except metadata.PackageNotFoundError:
        return "unknown"

# SPDX-License-Identifier: Apache-2.0
"""Where OpenStack's programs are, and the environment in which they run."""

import os
from pathlib import Path

#: Of Nova.
RELEASE = "34"
ROOT = Path(__file__).parents[3]
VENV = ROOT / ".make" / f"openstack-{RELEASE}"
#: Versions of what is in it.
CONSTRAINTS = ROOT / "tools/openstack/constraints.txt"
#: What stands in for programs that a lab cannot have.
PROGRAMS = Path(__file__).with_name("programs")


def program(name: str) -> str:
    """A program of the virtual environment."""
    return str(VENV / "bin" / name)


def environment(**more: str) -> dict[str, str]:
    """For all processes of the cloud."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OS_", "PYTHON", "UWSGI_"))
    }
    path = os.pathsep.join((str(PROGRAMS), str(VENV / "bin"), os.environ["PATH"]))
    # Warnings of libraries about each other would fill the logs
    return {**kept, "PATH": path, "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "ignore", **more}

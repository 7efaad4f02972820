# SPDX-License-Identifier: Apache-2.0
"""What guests and hosts have to say to an operator: short sentences with a stable code."""

from __future__ import annotations

import dataclasses
import enum


class Severity(str, enum.Enum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # worth knowing; part of the benefit may be lost
    PROBLEM = "problem"  # something that ought to work does not


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing found out about a guest, a host, or a migration that is meant.

    ``code`` is stable kebab-case for programs, ``message`` the operator's sentence.
    """

    code: str
    severity: Severity
    message: str

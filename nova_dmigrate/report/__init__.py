# SPDX-License-Identifier: Apache-2.0
"""Migrations compared: a table, plots, one HTML file and ``report.json``.

Knows nothing of how migrations are made or measured. Only ``plots`` needs matplotlib.
"""

from nova_dmigrate.report.comparison import format_comparison
from nova_dmigrate.report.html import Section
from nova_dmigrate.report.table import format_table
from nova_dmigrate.report.write import ReportFiles, write_report

__all__ = ["ReportFiles", "Section", "format_comparison", "format_table", "write_report"]

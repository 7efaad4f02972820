# SPDX-License-Identifier: Apache-2.0
"""Colours and type of the plots.

The colours are Okabe and Ito's, which people with any of the usual colour vision tell apart; what
two of them distinguish differs in lightness or by a label as well.
"""

from typing import Any

NETWORK, VOLUME = "#0072B2", "#E69F00"
THROUGHPUT, LATENCY = "#333333", "#CC79A7"
DMIGRATE, OTHERS = "#009E73", "#9A9A9A"
DOWNTIME, MIGRATION = "#D55E00", "#000000"
MIGRATION_ALPHA = 0.07

#: matplotlib's settings while a figure is made and rendered.
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "savefig.dpi": 120,
    "text.parse_math": False,  # a dollar in a name is a dollar
}

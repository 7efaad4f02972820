# SPDX-License-Identifier: Apache-2.0
"""The loads that there are: how their tables are made, of which size, and how they are run."""

from collections.abc import Sequence

from tests.lab.demo import tpcc
from tests.lab.demo.clients import Server
from tests.lab.demo.load import SYSBENCH_LOADS, TABLES, sysbench

TPCC = "tpcc"
LOADS = (*SYSBENCH_LOADS, TPCC)
#: How much of the pool the tables fill; the rest is for the undo logs, the dictionary, ...
FILL = 0.85
#: What a row of sysbench's tables takes, and what a warehouse of TPC-C does, indexes included.
_ROW_BYTES = 250
_WAREHOUSE_MB = 110


def loader(load: str, pool_mb: int) -> list[str]:
    """The command that makes tables which fill a pool; `@SOCKET@` stands for the server's."""
    if load == TPCC:
        server = Server(socket="@SOCKET@", user="root", password="")
        return server.module(tpcc.__name__, "load", _warehouses(pool_mb))
    return [
        *("sysbench", "oltp_common", "--db-driver=mysql", "--mysql-socket=@SOCKET@"),
        *("--mysql-user=root", f"--tables={TABLES}", f"--table-size={_rows(pool_mb)}"),
        *("--threads=2", "prepare"),
    ]


def command(load: str, server: Server, pool_mb: int, rate: float) -> Sequence[str]:
    """The load's command line, for tables that fill a pool of this size.

    :param rate: of sysbench's loads; TPC-C always runs as fast as it can.
    """
    if load == TPCC:
        return tpcc.command(server, _warehouses(pool_mb))
    return sysbench(server, load, _rows(pool_mb), rate)


def _rows(pool_mb: int) -> int:
    return int(pool_mb * FILL * (1 << 20) / _ROW_BYTES / TABLES)


def _warehouses(pool_mb: int) -> int:
    return max(int(pool_mb * FILL / _WAREHOUSE_MB), 1)

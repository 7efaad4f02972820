# SPDX-License-Identifier: Apache-2.0
"""Whether the tables of a guest's database are sound."""

from tests.lab.database_guest import DatabaseGuest

#: Of which tables are checked.
SCHEMAS = "'sbtest', 'lab', 'ledger', 'tpcc'"


def table_errors(guest: DatabaseGuest) -> list[str]:
    """What is wrong with the tables, as CHECK TABLE EXTENDED says."""
    names = guest.sql(
        "SELECT CONCAT(table_schema, '.', table_name) FROM information_schema.tables"
        f" WHERE table_type = 'BASE TABLE' AND table_schema IN ({SCHEMAS})"
    ).split()
    lines = guest.sql(f"CHECK TABLE {', '.join(names)} EXTENDED", timeout=900).splitlines()
    return [line for line in lines if line.split("\t")[2:] != ["status", "OK"]]

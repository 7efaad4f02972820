# SPDX-License-Identifier: Apache-2.0
"""The load of TPC-C: its five transactions in its mix (revision 5.11, clauses 2, 5.2.3), without
keying and thinking times.

Tells every second what it has done, as sysbench does. `load` makes the tables instead.
"""

import dataclasses
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pymysql

from tests.lab.demo import tpcc_data as data
from tests.lab.demo.clients import Server, parser, server_of, until_asked_to_end

DATABASE = "tpcc"
THREADS = 2
_RETRY = 0.2


def command(server: Server, warehouses: int) -> list[str]:
    """The command line of the load, which does not end by itself."""
    return server.module(__name__, "run", warehouses)


class Rollback(Exception):
    """A new order has an item that does not exist, as one in a hundred shall."""


@dataclasses.dataclass
class Terminal:
    """One terminal of a warehouse; ``cursor`` is that of its connection."""

    cursor: Any
    warehouse: int
    warehouses: int

    def one(self, statement: str, *values: object) -> tuple[Any, ...]:
        self.cursor.execute(statement, values)
        row: tuple[Any, ...] = self.cursor.fetchone()
        return row

    def all(self, statement: str, *values: object) -> tuple[tuple[Any, ...], ...]:
        self.cursor.execute(statement, values)
        rows: tuple[tuple[Any, ...], ...] = self.cursor.fetchall()
        return rows

    def do(self, statement: str, *values: object) -> None:
        self.cursor.execute(statement, values)

    def other_warehouse(self) -> int:
        """A remote warehouse, its own if there is no other."""
        others = [each for each in range(1, self.warehouses + 1) if each != self.warehouse]
        return random.choice(others or [self.warehouse])


def new_order(t: Terminal) -> None:
    """Clause 2.4."""
    w, d, c = t.warehouse, random.randint(1, data.DISTRICTS), data.customer_number()
    count = random.randint(5, 15)
    lines = []
    for _ in range(count):
        supply = t.other_warehouse() if random.random() < 0.01 else w
        lines.append((data.item_number(), supply, random.randint(1, 10)))
    if random.random() < 0.01:
        lines[-1] = (data.ITEMS + 1, w, 1)
    t.one("SELECT w_tax FROM warehouse WHERE w_id = %s", w)
    here = "WHERE d_w_id = %s AND d_id = %s"
    (order,) = t.one(f"SELECT d_next_o_id FROM district {here} FOR UPDATE", w, d)
    t.do(f"UPDATE district SET d_next_o_id = d_next_o_id + 1 {here}", w, d)
    t.one(
        "SELECT c_discount, c_last, c_credit FROM customer"
        " WHERE c_w_id = %s AND c_d_id = %s AND c_id = %s",
        *(w, d, c),
    )
    local = int(all(supply == w for _, supply, _ in lines))
    t.do(
        "INSERT INTO orders VALUES (%s, %s, %s, %s, NOW(), NULL, %s, %s)",
        *(w, d, order, c, count, local),
    )
    t.do("INSERT INTO new_order VALUES (%s, %s, %s)", w, d, order)
    for number, (item, supply, quantity) in enumerate(lines, 1):
        found = t.one("SELECT i_price, i_name, i_data FROM item WHERE i_id = %s", item)
        if found is None:
            raise Rollback
        which = "WHERE s_w_id = %s AND s_i_id = %s"
        stock, dist = t.one(
            f"SELECT s_quantity, SUBSTR(s_dist, %s, 24) FROM stock {which} FOR UPDATE",
            *(24 * d - 23, supply, item),
        )
        left = stock - quantity if stock >= quantity + 10 else stock - quantity + 91
        t.do(
            "UPDATE stock SET s_quantity = %s, s_ytd = s_ytd + %s, s_order_cnt = s_order_cnt + 1,"
            f" s_remote_cnt = s_remote_cnt + %s {which}",
            *(left, quantity, int(supply != w), supply, item),
        )
        t.do(
            "INSERT INTO order_line VALUES (%s, %s, %s, %s, %s, %s, NULL, %s, %s, %s)",
            *(w, d, order, number, item, supply, quantity, quantity * found[0], dist),
        )


def payment(t: Terminal) -> None:
    """Clause 2.5."""
    w, d = t.warehouse, random.randint(1, data.DISTRICTS)
    amount = round(random.uniform(1, 5000), 2)
    c_w, c_d = w, d
    if random.random() < 0.15:
        c_w, c_d = t.other_warehouse(), random.randint(1, data.DISTRICTS)
    t.do("UPDATE warehouse SET w_ytd = w_ytd + %s WHERE w_id = %s", amount, w)
    (w_name,) = t.one("SELECT w_name FROM warehouse WHERE w_id = %s", w)
    here = "WHERE d_w_id = %s AND d_id = %s"
    t.do(f"UPDATE district SET d_ytd = d_ytd + %s {here}", amount, w, d)
    (d_name,) = t.one(f"SELECT d_name FROM district {here}", w, d)
    c = _customer(t, c_w, c_d)
    which = "WHERE c_w_id = %s AND c_d_id = %s AND c_id = %s"
    credit, about = t.one(f"SELECT c_credit, c_data FROM customer {which} FOR UPDATE", c_w, c_d, c)
    if credit == "BC":
        about = f"{c},{c_d},{c_w},{d},{w},{amount}|{about}"[:500]
    t.do(
        "UPDATE customer SET c_balance = c_balance - %s, c_ytd_payment = c_ytd_payment + %s,"
        f" c_payment_cnt = c_payment_cnt + 1, c_data = %s {which}",
        *(amount, amount, about, c_w, c_d, c),
    )
    t.do(
        "INSERT INTO history VALUES (NULL, %s, %s, %s, %s, %s, NOW(), %s, %s)",
        *(c, c_d, c_w, d, w, amount, f"{w_name}    {d_name}"),
    )


def order_status(t: Terminal) -> None:
    """Clause 2.6."""
    w, d = t.warehouse, random.randint(1, data.DISTRICTS)
    c = _customer(t, w, d)
    found = t.one(
        "SELECT o_id, o_entry_d, o_carrier_id FROM orders"
        " WHERE o_w_id = %s AND o_d_id = %s AND o_c_id = %s ORDER BY o_id DESC LIMIT 1",
        *(w, d, c),
    )
    if found is not None:
        t.all(
            "SELECT ol_i_id, ol_supply_w_id, ol_quantity, ol_amount, ol_delivery_d FROM order_line"
            " WHERE ol_w_id = %s AND ol_d_id = %s AND ol_o_id = %s",
            *(w, d, found[0]),
        )


def delivery(t: Terminal) -> None:
    """Clause 2.7, all districts in one database transaction."""
    w, carrier = t.warehouse, random.randint(1, 10)
    for d in range(1, data.DISTRICTS + 1):
        found = t.one(
            "SELECT no_o_id FROM new_order WHERE no_w_id = %s AND no_d_id = %s"
            " ORDER BY no_o_id LIMIT 1 FOR UPDATE",
            *(w, d),
        )
        if found is None:
            continue
        order = found[0]
        key = (w, d, order)
        t.do("DELETE FROM new_order WHERE no_w_id = %s AND no_d_id = %s AND no_o_id = %s", *key)
        which = "WHERE o_w_id = %s AND o_d_id = %s AND o_id = %s"
        (c,) = t.one(f"SELECT o_c_id FROM orders {which}", *key)
        t.do(f"UPDATE orders SET o_carrier_id = %s {which}", carrier, *key)
        lines = "WHERE ol_w_id = %s AND ol_d_id = %s AND ol_o_id = %s"
        t.do(f"UPDATE order_line SET ol_delivery_d = NOW() {lines}", *key)
        (amount,) = t.one(f"SELECT SUM(ol_amount) FROM order_line {lines}", *key)
        t.do(
            "UPDATE customer SET c_balance = c_balance + %s, c_delivery_cnt = c_delivery_cnt + 1"
            " WHERE c_w_id = %s AND c_d_id = %s AND c_id = %s",
            *(amount, w, d, c),
        )


def stock_level(t: Terminal) -> None:
    """Clause 2.8."""
    w, d = t.warehouse, random.randint(1, data.DISTRICTS)
    (following,) = t.one("SELECT d_next_o_id FROM district WHERE d_w_id = %s AND d_id = %s", w, d)
    t.one(
        "SELECT COUNT(DISTINCT s_i_id) FROM order_line JOIN stock"
        " ON s_w_id = ol_w_id AND s_i_id = ol_i_id WHERE ol_w_id = %s AND ol_d_id = %s"
        " AND ol_o_id >= %s AND ol_o_id < %s AND s_quantity < %s",
        *(w, d, following - 20, following, random.randint(10, 20)),
    )


def _customer(t: Terminal, w: int, d: int) -> int:
    """A customer by number, or more often the middle one of those with a name (2.5.2.2)."""
    if random.random() >= 0.6:
        return data.customer_number()
    found = t.all(
        "SELECT c_id FROM customer WHERE c_w_id = %s AND c_d_id = %s AND c_last = %s"
        " ORDER BY c_first",
        *(w, d, data.last_name()),
    )
    if not found:  # not every name need be there
        return data.customer_number()
    return int(found[(len(found) - 1) // 2][0])


#: In percent; at least as much of each as the specification demands, new orders are the rest.
MIX: dict[Callable[[Terminal], None], int] = {
    new_order: 45,
    payment: 43,
    order_status: 4,
    delivery: 4,
    stock_level: 4,
}


class _Done:
    """What terminals have done since it was last told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latencies: list[float] = []
        self._errors = 0

    def note(self, seconds: float) -> None:
        with self._lock:
            self._latencies.append(seconds)

    def note_error(self) -> None:
        with self._lock:
            self._errors += 1

    def tell(self, second: int, elapsed: float) -> str:
        with self._lock:
            latencies, self._latencies = sorted(self._latencies), []
            errors, self._errors = self._errors, 0
        slow = latencies[int(0.95 * len(latencies))] if latencies else 0.0
        return (
            f"[ {second}s ] thds: {THREADS} tps: {len(latencies) / elapsed:.2f} lat (ms,95%):"
            f" {slow * 1e3:.2f} err/s: {errors / elapsed:.2f}"
        )


def run(server: Server, warehouses: int, ended: threading.Event) -> None:
    """Work until asked to end."""
    done = _Done()
    threads = [
        threading.Thread(
            target=_work, args=(server, 1 + number % warehouses, warehouses, done, ended)
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    begin, second = time.monotonic(), 0
    told = begin
    while not ended.wait(max(begin + second + 1 - time.monotonic(), 0)):
        second += 1
        now = time.monotonic()
        print(done.tell(second, now - told), flush=True)
        told = now
    for thread in threads:
        thread.join()


def _work(
    server: Server, warehouse: int, warehouses: int, done: _Done, ended: threading.Event
) -> None:
    kinds, weights = list(MIX), list(MIX.values())
    while not ended.is_set():
        try:
            with server.connect() as connection, connection.cursor() as cursor:
                connection.autocommit(False)
                connection.select_db(DATABASE)
                terminal = Terminal(cursor, warehouse, warehouses)
                while not ended.is_set():
                    begin = time.monotonic()
                    (kind,) = random.choices(kinds, weights)
                    try:
                        kind(terminal)
                        connection.commit()
                    except Rollback:
                        connection.rollback()
                    done.note(time.monotonic() - begin)
        except (pymysql.err.Error, OSError) as error:  # also a deadlock: what it did is undone
            done.note_error()
            print(f"{error!r}", file=sys.stderr, flush=True)
            ended.wait(_RETRY)


def load(server: Server, warehouses: int) -> None:
    """Make the database with all its tables."""
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {DATABASE}")
        connection.select_db(DATABASE)
        connection.autocommit(False)
        data.populate(connection, warehouses)


def main() -> None:
    made = parser("TPC-C's load, or its tables.")
    made.add_argument("what", choices=("run", "load"))
    made.add_argument("warehouses", type=int)
    arguments = made.parse_args()
    server = server_of(arguments)
    if arguments.what == "load":
        load(server, arguments.warehouses)
    else:
        run(server, arguments.warehouses, until_asked_to_end())


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Tables and population of TPC-C (revision 5.11, clauses 1.3, 4.3) and its random numbers (2.1.6).

Sizes are those of the specification: a warehouse has 10 districts, 30000 customers, as many orders,
and 100000 stocks, about 100 MB with all indexes.
"""

import itertools
import random
import string
from collections.abc import Iterable, Iterator
from typing import Any

ITEMS = 100_000
DISTRICTS = 10
CUSTOMERS = 3000
ORDERS = 3000
#: Of the orders of a district, those from this one on have not been delivered.
FIRST_NEW_ORDER = 2101
_BATCH = 500

TABLES = """
CREATE TABLE warehouse (w_id INT PRIMARY KEY, w_name VARCHAR(10), w_street_1 VARCHAR(20),
    w_street_2 VARCHAR(20), w_city VARCHAR(20), w_state CHAR(2), w_zip CHAR(9),
    w_tax DECIMAL(4,4), w_ytd DECIMAL(12,2));
CREATE TABLE district (d_w_id INT, d_id INT, d_name VARCHAR(10), d_street_1 VARCHAR(20),
    d_street_2 VARCHAR(20), d_city VARCHAR(20), d_state CHAR(2), d_zip CHAR(9),
    d_tax DECIMAL(4,4), d_ytd DECIMAL(12,2), d_next_o_id INT, PRIMARY KEY (d_w_id, d_id));
CREATE TABLE customer (c_w_id INT, c_d_id INT, c_id INT, c_first VARCHAR(16), c_middle CHAR(2),
    c_last VARCHAR(16), c_street_1 VARCHAR(20), c_street_2 VARCHAR(20), c_city VARCHAR(20),
    c_state CHAR(2), c_zip CHAR(9), c_phone CHAR(16), c_since DATETIME, c_credit CHAR(2),
    c_credit_lim DECIMAL(12,2), c_discount DECIMAL(4,4), c_balance DECIMAL(12,2),
    c_ytd_payment DECIMAL(12,2), c_payment_cnt INT, c_delivery_cnt INT, c_data VARCHAR(500),
    PRIMARY KEY (c_w_id, c_d_id, c_id), KEY (c_w_id, c_d_id, c_last, c_first));
CREATE TABLE history (h_id BIGINT AUTO_INCREMENT PRIMARY KEY, h_c_id INT, h_c_d_id INT,
    h_c_w_id INT, h_d_id INT, h_w_id INT, h_date DATETIME, h_amount DECIMAL(6,2),
    h_data VARCHAR(24));
CREATE TABLE orders (o_w_id INT, o_d_id INT, o_id INT, o_c_id INT, o_entry_d DATETIME,
    o_carrier_id INT, o_ol_cnt INT, o_all_local INT, PRIMARY KEY (o_w_id, o_d_id, o_id),
    KEY (o_w_id, o_d_id, o_c_id, o_id));
CREATE TABLE new_order (no_w_id INT, no_d_id INT, no_o_id INT,
    PRIMARY KEY (no_w_id, no_d_id, no_o_id));
CREATE TABLE order_line (ol_w_id INT, ol_d_id INT, ol_o_id INT, ol_number INT, ol_i_id INT,
    ol_supply_w_id INT, ol_delivery_d DATETIME, ol_quantity INT, ol_amount DECIMAL(6,2),
    ol_dist_info CHAR(24), PRIMARY KEY (ol_w_id, ol_d_id, ol_o_id, ol_number));
CREATE TABLE item (i_id INT PRIMARY KEY, i_im_id INT, i_name VARCHAR(24), i_price DECIMAL(5,2),
    i_data VARCHAR(50));
CREATE TABLE stock (s_w_id INT, s_i_id INT, s_quantity INT, s_dist CHAR(240), s_ytd INT,
    s_order_cnt INT, s_remote_cnt INT, s_data VARCHAR(50), PRIMARY KEY (s_w_id, s_i_id))
"""

_SYLLABLES = ("BAR", "OUGHT", "ABLE", "PRI", "PRES", "ESE", "ANTI", "CALLY", "ATION", "EING")
_LETTERS = string.ascii_letters + string.digits
_NOW = "2026-01-01 00:00:00"
# The constants C of NURand; C_LAST of run and load differ by 65 to 119, but not by 96 or 112
_C_LOAD, _C_RUN, _C_CUSTOMER, _C_ITEM = 100, 200, 259, 7911


def customer_number() -> int:
    return _nu_rand(1023, 1, CUSTOMERS, _C_CUSTOMER)


def item_number() -> int:
    return _nu_rand(8191, 1, ITEMS, _C_ITEM)


def last_name(number: int | None = None) -> str:
    """The name of a number below 1000; a random one, as terminals enter it, if None."""
    if number is None:
        number = _nu_rand(255, 0, 999, _C_RUN)
    return "".join(_SYLLABLES[digit] for digit in (number // 100, number // 10 % 10, number % 10))


def text(least: int, most: int | None = None) -> str:
    length = random.randint(least, most or least)
    return "".join(random.choices(_LETTERS, k=length))


def populate(connection: Any, warehouses: int) -> None:
    """Make and fill the tables, in the database that is in use."""
    with connection.cursor() as cursor:
        for statement in TABLES.split(";"):
            cursor.execute(statement + " CHARSET latin1")
        _insert(connection, "item", _items())
        for warehouse in range(1, warehouses + 1):
            _insert(connection, "warehouse", [_warehouse(warehouse)])
            _insert(connection, "stock", _stocks(warehouse))
            for district in range(1, DISTRICTS + 1):
                _insert(connection, "district", [_district(warehouse, district)])
                _insert(connection, "customer", _customers(warehouse, district))
                _insert(connection, "history", _histories(warehouse, district))
                _fill_orders(connection, warehouse, district)


def _nu_rand(mask: int, least: int, most: int, constant: int) -> int:
    mixed = (random.randint(0, mask) | random.randint(least, most)) + constant
    return mixed % (most - least + 1) + least


def _insert(connection: Any, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    left = iter(rows)
    with connection.cursor() as cursor:
        while batch := list(itertools.islice(left, _BATCH)):
            places = ", ".join(["%s"] * len(batch[0]))
            cursor.executemany(f"INSERT INTO {table} VALUES ({places})", batch)
    connection.commit()


def _address() -> tuple[str, str, str, str, str]:
    zip_code = f"{random.randint(0, 9999):04d}11111"
    return text(10, 20), text(10, 20), text(10, 20), text(2), zip_code


def _data() -> str:
    data = text(26, 50)
    return data[:10] + "ORIGINAL" + data[18:] if random.random() < 0.1 else data


def _tax() -> float:
    return round(random.uniform(0, 0.2), 4)


def _items() -> Iterator[tuple[Any, ...]]:
    for item in range(1, ITEMS + 1):
        price = round(random.uniform(1, 100), 2)
        yield item, random.randint(1, 10_000), text(14, 24), price, _data()


def _warehouse(warehouse: int) -> tuple[Any, ...]:
    return warehouse, text(6, 10), *_address(), _tax(), 300_000


def _district(warehouse: int, district: int) -> tuple[Any, ...]:
    return warehouse, district, text(6, 10), *_address(), _tax(), 30_000, ORDERS + 1


def _stocks(warehouse: int) -> Iterator[tuple[Any, ...]]:
    for item in range(1, ITEMS + 1):
        yield warehouse, item, random.randint(10, 100), text(240), 0, 0, 0, _data()


def _customers(warehouse: int, district: int) -> Iterator[tuple[Any, ...]]:
    for customer in range(1, CUSTOMERS + 1):
        number = customer - 1 if customer <= 1000 else _nu_rand(255, 0, 999, _C_LOAD)
        yield (
            *(warehouse, district, customer, text(8, 16), "OE", last_name(number), *_address()),
            *("0123456789012345", _NOW, "BC" if random.random() < 0.1 else "GC", 50_000),
            *(round(random.uniform(0, 0.5), 4), -10, 10, 1, 0, text(300, 500)),
        )


def _histories(warehouse: int, district: int) -> Iterator[tuple[Any, ...]]:
    for customer in range(1, CUSTOMERS + 1):
        yield None, customer, district, warehouse, district, warehouse, _NOW, 10, text(12, 24)


def _fill_orders(connection: Any, warehouse: int, district: int) -> None:
    customers = random.sample(range(1, CUSTOMERS + 1), CUSTOMERS)
    orders, lines, new = [], [], []
    for order, customer in enumerate(customers, 1):
        delivered = order < FIRST_NEW_ORDER
        count = random.randint(5, 15)
        carrier = random.randint(1, 10) if delivered else None
        orders.append((warehouse, district, order, customer, _NOW, carrier, count, 1))
        if not delivered:
            new.append((warehouse, district, order))
        for line in range(1, count + 1):
            amount = 0 if delivered else round(random.uniform(0.01, 9999.99), 2)
            when = _NOW if delivered else None
            item = random.randint(1, ITEMS)
            row = (warehouse, district, order, line, item, warehouse, when, 5, amount, text(24))
            lines.append(row)
    _insert(connection, "orders", orders)
    _insert(connection, "new_order", new)
    _insert(connection, "order_line", lines)

# SPDX-License-Identifier: Apache-2.0
"""Checks of values that come from the other side, and records that are made of them.

A checker takes a value as JSON gives it and returns what it stands for, or raises `Malformed`.
The fields of a record carry theirs in the dataclass's metadata, see `checked`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Checker = Callable[[Any], Any]

# A newer minor version may add fields: they are ignored, but not without end.
MAX_FIELDS = 64

_CHECK = "check"
_SECRET = re.compile(r"[0-9a-f]{64}")
_SHOWN = 40


class Malformed(ValueError):
    """A value is not what the protocol says. The text names the field."""


def checked(check: Checker, **options: Any) -> Any:
    """A dataclass field whose values ``check`` guards when they arrive."""
    return dataclasses.field(metadata={_CHECK: check}, **options)


def parse(cls: type[T], value: Any, strict: bool = False) -> T:
    """A record of ``cls`` from a dict, as JSON gives it.

    :param strict: refuse fields that the record does not have, instead of ignoring them.
    :raises Malformed: if a field is missing, wrong or beyond its limits.
    """
    if not isinstance(value, dict) or len(value) > MAX_FIELDS:
        raise Malformed(f"{cls.__name__} is not an object of at most {MAX_FIELDS} fields")
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    if strict:
        strange = value.keys() - {field.name for field in known}
        if strange:
            raise Malformed(f"{cls.__name__} has no field {_show(min(map(str, strange)))}")
    arguments = {}
    for field in known:
        if field.name in value:
            try:
                arguments[field.name] = field.metadata[_CHECK](value[field.name])
            except Malformed as error:
                raise Malformed(f"{field.name}: {error}") from None
        elif field.default is dataclasses.MISSING:
            raise Malformed(f"{cls.__name__} lacks {field.name}")
    return cls(**arguments)


def to_dict(record: Any) -> dict[str, Any]:
    """A record as JSON can carry it."""
    return dataclasses.asdict(record)


def boolean(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise Malformed(f"{_show(value)} is neither true nor false")
    return value


def integer(low: int, high: int) -> Checker:
    """A whole number of low..high."""

    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Malformed(f"{_show(value)} is not a whole number of {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Checker:
    """A finite number of low..high."""

    def check(value: Any) -> float:
        # An int of any size compares with a float, but cannot always become one: range first.
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
            or math.isnan(value)
        ):
            raise Malformed(f"{_show(value)} is not a number of {low:g} to {high:g}")
        return float(value)

    return check


def text(limit: int) -> Checker:
    """A sentence for people. What cannot be printed becomes "?": it will be in somebody's log."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise Malformed(f"{_show(value)} is not a text of at most {limit} characters")
        return (
            value if value.isprintable() else "".join(c if c.isprintable() else "?" for c in value)
        )

    return check


def token(limit: int = 64) -> Checker:
    """An identifier: letters, digits, dot, dash, underscore; not empty."""
    allowed = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")

    def check(value: Any) -> str:
        if (
            not isinstance(value, str)
            or not 0 < len(value) <= limit
            or not allowed.issuperset(value)
        ):
            raise Malformed(f"{_show(value)} is not an identifier of at most {limit} characters")
        return value

    return check


def path(limit: int = 1024) -> Checker:
    """An absolute path without detours. What it names is not looked at."""

    def check(value: Any) -> str:
        if (
            not isinstance(value, str)
            or len(value.encode("utf-8", "surrogatepass")) > limit
            or not value.startswith("/")
            or not value.isprintable()
            or ".." in value.split("/")
        ):
            raise Malformed(f"{_show(value)} is not an absolute path of at most {limit} bytes")
        return value

    return check


def secret(value: Any) -> str:
    """32 bytes as hexadecimal digits. What is wrong with it is not shown."""
    if not isinstance(value, str) or not _SECRET.fullmatch(value):
        raise Malformed("not 64 hexadecimal digits")
    return value


def choice(*values: str) -> Checker:
    """One of some words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise Malformed(f"{_show(value)} is none of {', '.join(values)}")
        return value

    return check


def optional(check: Checker) -> Checker:
    """What ``check`` accepts, or null."""
    return lambda value: None if value is None else check(value)


def several(check: Checker, limit: int) -> Checker:
    """A list of at most ``limit`` items, as a tuple."""

    def check_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise Malformed(f"not a list of at most {limit} items")
        return tuple(check(item) for item in value)

    return check_all


def record(cls: type[Any]) -> Checker:
    """A record within a record."""
    return lambda value: parse(cls, value)


def _show(value: Any) -> str:
    """A strange value, short: it may be anything of any size."""
    if isinstance(value, (str, int, float)) and not (isinstance(value, int) and value > 1 << 64):
        shown = repr(value[:_SHOWN] if isinstance(value, str) else value)
        return shown if len(shown) <= 2 * _SHOWN else shown[:_SHOWN] + "..."
    return f"a {type(value).__name__}"

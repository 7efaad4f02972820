# SPDX-License-Identifier: Apache-2.0
"""What arrives is checked field by field."""

import dataclasses
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate.rpc import fields, messages
from nova_dmigrate.rpc.protocol import Refusal
from tests import base

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
RECORDS = sorted({method.result for method in messages.METHODS.values()}, key=lambda c: c.__name__)
ARGUMENTS = sorted(
    {method.arguments for method in messages.METHODS.values()}, key=lambda c: c.__name__
)


@dataclasses.dataclass(frozen=True)
class Sample:
    count: int = fields.checked(fields.integer(0, 10))
    name: str = fields.checked(fields.text(5), default="none")


class FieldsTest(base.TestCase):
    def assert_malformed(self, check: Any, *values: Any) -> None:
        for value in values:
            self.assertRaises(fields.Malformed, check, value)

    def test_whole_numbers_have_a_range_and_are_no_booleans(self) -> None:
        check = fields.integer(1, 5)
        self.assertEqual(5, check(5))
        self.assert_malformed(check, 0, 6, 1.0, True, "3", None, 10**5000)

    def test_numbers_are_finite(self) -> None:
        check = fields.number(0, 1)
        self.assertEqual(1.0, check(1))
        self.assert_malformed(check, -0.1, 1.1, math.nan, math.inf, "0", None, False, 10**400)

    def test_texts_lose_what_cannot_be_printed(self) -> None:
        check = fields.text(20)
        self.assertEqual("Käse", check("Käse"))
        self.assertEqual("a?b?[31mred", check("a\nb\x1b[31mred"))
        self.assert_malformed(check, "x" * 21, 5, None)

    def test_identifiers_are_plain(self) -> None:
        check = fields.token(5)
        self.assertEqual("a-1_.", check("a-1_."))
        self.assert_malformed(check, "", "abcdef", "a b", "a\n", "ä", None, 3)

    def test_lists_have_a_limit(self) -> None:
        check = fields.several(fields.boolean, 2)
        self.assertEqual((True, False), check([True, False]))
        self.assert_malformed(check, [True] * 3, [1], "ab", None, {})

    def test_a_record_wants_its_fields_and_ignores_those_of_the_future(self) -> None:
        self.assertEqual(Sample(3), fields.parse(Sample, {"count": 3, "later": [1]}))
        self.assert_malformed(lambda v: fields.parse(Sample, v), {}, {"count": 11}, [], None, 3)
        self.assert_malformed(
            lambda v: fields.parse(Sample, v), {"count": 1, **{str(n): n for n in range(64)}}
        )

    def test_arguments_of_the_future_are_refused(self) -> None:
        error = self.assertRaises(
            fields.Malformed, fields.parse, Sample, {"count": 3, "later": 1}, strict=True
        )
        self.assertIn("later", str(error))

    def test_a_malformed_field_is_named(self) -> None:
        error = self.assertRaises(fields.Malformed, fields.parse, Sample, {"count": "x" * 1000})
        self.assertIn("count", str(error))
        self.assertLess(len(str(error)), 200)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.sampled_from(RECORDS + ARGUMENTS), JSON)
    def test_anything_is_either_a_record_or_malformed(self, cls: type, value: Any) -> None:
        try:
            self.assertIsInstance(fields.parse(cls, value), cls)
        except fields.Malformed as error:
            self.assertLess(len(str(error)), 500)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.sampled_from(sorted(messages.METHODS)), JSON, st.sampled_from(["result", "error"]))
    def test_any_answer_is_a_result_a_refusal_or_malformed(
        self, method: str, value: Any, key: str
    ) -> None:
        for answer in (value, {key: value}):
            try:
                found = messages.AGENT.result_of(method, answer)
            except fields.Malformed:
                continue
            allowed = (messages.METHODS[method].result, Refusal)
            self.assertIsInstance(found, allowed)

    def test_every_field_of_every_record_is_checked(self) -> None:
        for cls in [*RECORDS, *ARGUMENTS, messages.Server, messages.Finding, Refusal]:
            for field in dataclasses.fields(cls):
                self.assertIn("check", field.metadata, f"{cls.__name__}.{field.name}")

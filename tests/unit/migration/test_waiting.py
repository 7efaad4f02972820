# SPDX-License-Identifier: Apache-2.0

import threading

from nova_dmigrate.migration.waiting import Question, Setting
from tests import base


class QuestionTest(base.TestCase):
    def test_who_has_asked_can_wait_until_nothing_is_asked_any_more(self) -> None:
        let = threading.Event()
        question = Question(lambda: let.wait(60))
        self.assertTrue(question.wait(0))
        self.assertIsNone(question.answer())
        self.assertFalse(question.wait(0.1))
        let.set()
        self.assertTrue(question.wait(60))
        self.assertTrue(question.answer())


class SettingTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.let = threading.Event()
        self.values: list[int] = []

    def put(self, value: int) -> bool:
        self.let.wait(60)
        self.values.append(value)
        return value != 0

    def test_the_last_value_is_the_last_one_set(self) -> None:
        setting = Setting(self.put)
        self.assertFalse(setting.set(1))
        self.assertFalse(setting.set(2))
        self.let.set()
        while not setting.set(2):
            pass
        self.assertEqual([1, 2], self.values)

    def test_what_cannot_be_set_is_not(self) -> None:
        self.let.set()
        self.assertFalse(Setting(self.put).set(0))

# SPDX-License-Identifier: Apache-2.0
"""The check that keeps what runs in a guest on its Python finds what it is there for."""

import contextlib
import io

from tests import base
from tools import check_python39

POSTPONED = "from __future__ import annotations\n"


class EvaluatedUnionsTest(base.TestCase):
    def test_unions_that_are_evaluated_are_found(self) -> None:
        for text in (
            "A = int | None",
            "A = None | Other",
            "A = bytes | bytearray | memoryview",
            "A = Sequence[int] | typing.Mapping",
            "isinstance(x, int | str)",
            "cast(dict[str, int | None], x)",
        ):
            self.assertEqual([2], check_python39.evaluated_unions(POSTPONED + text), text)

    def test_unions_in_annotations_are_allowed_where_those_are_postponed(self) -> None:
        text = "def f(x: int | None = 1 | 2) -> int | None:\n    y: str | None = x | 3\n"
        self.assertEqual([], check_python39.evaluated_unions(POSTPONED + text))
        self.assertEqual([1, 2], check_python39.evaluated_unions(text))

    def test_numbers_sets_and_flags_are_no_types(self) -> None:
        text = "a = b | 1\nc = os.O_RDONLY | os.O_DIRECT\nd = {1} | e\nf = A_FLAG | B_FLAG\n"
        self.assertEqual([], check_python39.evaluated_unions(text))


class CheckTest(base.TestCase):
    def check(self, text: str) -> tuple[int, str]:
        path = self.make_directory() / "checked.py"
        path.write_text(POSTPONED + text)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return check_python39.main([str(path)]), output.getvalue()

    def test_newer_syntax_and_library_are_found(self) -> None:
        for text in (
            "match x:\n    case 1: pass\n",
            "zip(a, b, strict=True)\n",
            "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass A: pass\n",
            "import itertools\nitertools.pairwise([])\n",
            "A = int | None\n",
        ):
            status, output = self.check(text)
            self.assertEqual(1, status, text)
            self.assertIn("checked.py", output)

    def test_what_is_old_enough_passes(self) -> None:
        self.assertEqual((0, ""), self.check("def f(x: int | None) -> None: ...\n"))

    def test_the_files_are_those_that_the_agent_imports(self) -> None:
        names = {str(path.relative_to(check_python39.ROOT)) for path in check_python39.files()}
        for name in ("agent/mapper.py", "rpc/client.py", "cmd/agent.py", "exception.py"):
            self.assertIn(f"nova_dmigrate/{name}", names)
        self.assertNotIn("nova_dmigrate/relay/source.py", names)

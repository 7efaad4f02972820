# SPDX-License-Identifier: Apache-2.0
"""Hold what the agent imports, and its tests, to the oldest Python of a guest.

No such Python is needed for that. ruff and vermin know the syntax and the library of each version;
what neither finds is a union of types that is evaluated (``Pair = int | None``), which only Python
3.10 can do. That is looked for here. Which files these are is said once, in pyproject.toml.

Usage: check_python39.py [FILE...]; exit status 1 if something was found.
"""

import ast
import builtins
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
_CAMEL_CASE = re.compile(r"_?[A-Z]\w*[a-z]\w*")


def files() -> list[Path]:
    """The files that pyproject.toml gives an older version to, of those that are in git."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = [
        each
        for pattern, version in settings["tool"]["ruff"]["per-file-target-version"].items()
        if version == "py39"
        for each in _alternatives(pattern)
    ]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for pattern in patterns:
        if not fnmatch.filter(listed, pattern):
            raise SystemExit(f"pyproject.toml: no file is like {pattern}")
    names = {name for pattern in patterns for name in fnmatch.filter(listed, pattern)}
    return [ROOT / name for name in sorted(names) if (ROOT / name).exists()]


def _alternatives(pattern: str) -> list[str]:
    """``a/{b,c}/**`` as fnmatch knows it, which has no braces: one pattern for each."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
    if match is None:
        return [pattern]
    return [f"{match[1]}{each}{match[3]}" for each in match[2].split(",")]


def evaluated_unions(source: str) -> list[int]:
    """The lines with a union of types that is evaluated.

    In a file that does not postpone its annotations every one of them counts as evaluated.
    """
    tree = ast.parse(source)
    postponed = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(name.name == "annotations" for name in node.names)
        for node in tree.body
    )
    return sorted({node.lineno for node in _evaluated(tree, postponed) if _is_union(node)})


def _evaluated(node: ast.AST, postponed: bool) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if postponed and name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _evaluated(child, postponed)


def _is_union(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.BitOr)
        and (_is_type(node.left) or _is_type(node.right))
    )


def _is_type(node: ast.AST) -> bool:
    """Whether an operand is a type, by its looks: None, a built-in one, or named like a class."""
    if isinstance(node, ast.Subscript):
        return _is_type(node.value)
    if isinstance(node, ast.Attribute):
        return _CAMEL_CASE.fullmatch(node.attr) is not None
    if isinstance(node, ast.Name):
        built_in = getattr(builtins, node.id, None)
        return isinstance(built_in, type) or _CAMEL_CASE.fullmatch(node.id) is not None
    return _is_union(node) or (isinstance(node, ast.Constant) and node.value is None)


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or files()
    found = [
        f"{path}:{line}: a union of types is evaluated, Python 3.9 cannot do that"
        for path in paths
        for line in evaluated_unions(path.read_text())
    ]
    print("\n".join(found), end="\n" if found else "")
    vermin = subprocess.run(
        [sys.executable, "-c", "import sys, vermin; sys.exit(vermin.main())"]
        + ["--target=3.9-", "--violations", "--no-tips", "-vvv", "--no-parse-comments"]
        + ["--processes=1", *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
    )
    if vermin.returncode:
        print(vermin.stdout + vermin.stderr, end="")
    return 1 if found or vermin.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""docs/reliability.md lists every case once, and the tests that prove it are there and say so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


def proofs() -> dict[str, set[int]]:
    """Each test that proves cases, and which."""
    found: dict[str, set[int]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                cases = {case for mark in node.decorator_list for case in _cases(mark)}
                if cases:
                    found[f"{path.relative_to(ROOT / 'tests')}::{node.name}"] = cases
    return found


def _cases(mark: ast.expr) -> list[int]:
    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
        return [ast.literal_eval(part) for part in mark.args]
    return []


def test_the_page_lists_the_tests_that_prove_each_case() -> None:
    listed = {int(case): set(re.findall(r"`([^`]+::[^`]+)`", tests)) for case, _, tests, _ in ROW.findall(PAGE)}
    marked: dict[int, set[str]] = {}
    for name, cases in proofs().items():
        for case in cases:
            marked.setdefault(case, set()).add(name)
    assert {case: tests for case, tests in listed.items() if tests} == marked


def test_every_case_is_on_the_page_and_what_is_not_proved_says_so() -> None:
    rows = ROW.findall(PAGE)
    assert [int(case) for case, *_ in rows] == sorted({int(case) for case, *_ in rows})
    for case, _, tests, result in rows:
        assert bool(tests.strip()) == (result.strip() != "not yet"), case

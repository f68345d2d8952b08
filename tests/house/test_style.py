"""How the code reads: short functions and files, honest names, sorted public names, recipes and commands that parse."""

from __future__ import annotations

import ast
import importlib
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrail
from vitrail.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "src" / "vitrail").rglob("*.py"))
DRAWERS = {"utils", "util", "common", "core", "helpers", "helper", "misc", "tools"}
MEDIAN, LONGEST, LONGEST_FILE = 12, 80, 400
UNFINISHED = ("TODO", "FIXME", "XXX", "NotImplementedError")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def code_lines(function: Function, text: str) -> int:
    """Lines from `def` to the end that are neither blank, nor comment, nor docstring."""
    lines = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function) is not None:
        lines -= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
    kept = [text.splitlines()[number - 1].strip() for number in lines]
    return sum(bool(line) and not line.startswith("#") for line in kept)


def swallowed(text: str) -> list[int]:
    """Line numbers of handlers that catch everything and do nothing."""
    wide = {None, "Exception", "BaseException"}
    handlers = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ExceptHandler))
    caught = (h for h in handlers if (getattr(h.type, "id", "") if h.type else None) in wide)
    return [h.lineno for h in caught if all(isinstance(s, ast.Pass | ast.Continue) for s in h.body)]


def test_functions_are_short():
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    lengths = {
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}": code_lines(f, text)
        for path, text in texts.items()
        for f in functions(text)
    }
    assert statistics.median(lengths.values()) <= MEDIAN
    assert {where: n for where, n in lengths.items() if n > LONGEST} == {}


def test_files_are_short():
    counts = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: n for name, n in counts.items() if n >= LONGEST_FILE} == {}


def test_no_drawer_for_everything():
    names = {part for path in FILES for part in path.relative_to(ROOT / "src").with_suffix("").parts}
    assert names & DRAWERS == set()


def test_no_error_is_swallowed():
    found = {str(path.relative_to(ROOT)): swallowed(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_nothing_is_unfinished():
    found = [f"{p.relative_to(ROOT)}: {w}" for p in FILES for w in UNFINISHED if w in p.read_text(encoding="utf-8")]
    assert found == []


def test_the_shipped_recipe_is_valid_and_names_its_command():
    """Those of `configs/` are tested in tests/trainer/test_recipes.py."""
    path = ROOT / "src" / "vitrail" / "assets" / "demo.yaml"
    assert TrainConfig.from_yaml(path).changes()
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("vitrail demo" in line for line in header)


def test_the_measures_see_faults():
    text = (
        'def f():\n    """One\n    two."""\n    # why\n\n    try:\n        a = 1\n    except Exception:\n        pass\n'
    )
    (function,) = functions(text)
    assert code_lines(function, text) == 5
    assert swallowed(text) == [8]
    assert swallowed(text.replace("Exception", "KeyError")) == []


def test_public_names_are_sorted():
    assert vitrail.__all__ == sorted(set(vitrail.__all__))
    assert dir(vitrail) == vitrail.__all__


@pytest.mark.parametrize("name", vitrail.__all__)
def test_public_names_resolve(name):
    value = getattr(vitrail, name)
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="got 'VisonTransformer'"):
        vitrail.VisonTransformer  # noqa: B018


def test_no_public_name_is_a_room():
    """`import vitrail.explain` would replace a function of that name by the room."""
    rooms = {path.name for path in (ROOT / "src" / "vitrail").iterdir() if path.is_dir()}
    assert rooms & set(vitrail.__all__) == set()


def test_type_checkers_see_the_public_names():
    """The imports for type checkers and the table that is used say the same."""
    tree = ast.parse((ROOT / "src" / "vitrail" / "__init__.py").read_text(encoding="utf-8"))
    (guard,) = (n for n in tree.body if isinstance(n, ast.If))
    declared = {alias.asname: node.module for node in guard.body for alias in node.names}
    assert declared == vitrail._HOMES


def test_all_of_every_module():
    """A module that lists its public names lists them sorted, and only such as it has."""
    faults = []
    for path in FILES:
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if name == "vitrail" or "\n__all__ = " not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(name)
        right = list(module.__all__) == sorted(module.__all__)
        leaks = [n for n in module.__all__ if n.startswith("_") or n not in vars(module)]
        faults += [name] if leaks or not right else []
    assert faults == []

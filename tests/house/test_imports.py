"""Who may import whom, and which library belongs to which room: the tables of docs/design.md against the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
GROUND = ("records", "names", "processes", "files", "folder")
HEAVY = ("lightning", "torchvision", "matplotlib", "captum", "timm", "transformers", "torchmetrics", "jsonargparse")


def table(header: str) -> list[list[str]]:
    """The rows of the table in docs/design.md whose header line begins with `header`, as cells."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = text[text.index(header) :].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()[2:]]


def room_rules() -> dict[str, set[str]]:
    rules = {}
    for room, allowed in table("| room | may import |"):
        words = set(allowed.replace("–", "").replace(",", " ").split())
        rules[room] = words - {"ground"} | (set(GROUND) if "ground" in words else set())
    return rules


def library_rules() -> dict[str, list[str]]:
    """Import name -> path prefixes below src/vitrail, of all its rows; the empty prefix is anywhere."""
    rules: dict[str, list[str]] = {}
    for names, _, rooms in table("| library | for | only in |"):
        prefixes = [""] if rooms == "anywhere" else re.findall(r"`([^`]+)`", rooms)
        for name in re.findall(r"`(\w+)`", names):
            rules[name] = rules.get(name, []) + prefixes
    return rules


def sources() -> dict[str, str]:
    """Module name -> text of every file of the package."""
    found = {}
    for path in sorted((SRC / "vitrail").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imported(text: str, modules: set[str]) -> Iterator[str]:
    """Every module that a text imports, wherever in the file; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def own(name: str) -> bool:
    return name.split(".")[0] == "vitrail"


def room(module: str) -> str:
    return [*module.split("."), "the package itself"][1]


def forbidden_rooms(texts: dict[str, str], rules: dict[str, set[str]]) -> list[str]:
    faults = []
    for module, text in texts.items():
        if module == "vitrail":  # the lazy table of public names
            continue
        allowed = rules.get(room(module), set()) | {room(module)}
        targets = sorted({name for name in imported(text, set(texts)) if own(name)})
        faults += [f"{module} imports {name}" for name in targets if room(name) not in allowed]
    return faults


def forbidden_libraries(texts: dict[str, str], rules: dict[str, list[str]]) -> list[str]:
    faults = []
    for module, text in texts.items():
        path = "/".join(module.split(".")[1:])
        for name in {n.split(".")[0] for n in imported(text, set(texts))} - set(sys.stdlib_module_names) - {"vitrail"}:
            places = rules.get(name, [])
            if not any(f"{path}.py" == p or f"{path}/".startswith(p) for p in places):
                faults.append(f"{module} imports {name}, which belongs to {', '.join(places) or 'no room'}")
    return faults


def circle(texts: dict[str, str]) -> list[str]:
    """The modules of one circle, or nothing."""
    graph = {m: {n for n in imported(t, set(texts)) if n in texts} for m, t in texts.items() if m != "vitrail"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_stands_in_the_table():
    rooms = {room(module) for module in sources() if module != "vitrail"}
    assert rooms <= set(room_rules()), "docs/design.md §2 lacks a room"


def test_every_file_stands_in_the_tree():
    """A file is found in docs/design.md, on the line of its room."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = re.sub(r"\n {20,}", " ", text.split("```")[1])  # a line that goes on belongs to the one before
    words = {
        found[0].removesuffix(".py"): set(found) for line in tree.splitlines() if (found := re.findall(r"[\w.]+", line))
    }
    paths = [module.split(".")[1:] for module in sources() if module != "vitrail"]
    lacking = ["/".join(path) for path in paths if not {path[-1], f"{path[-1]}.py"} & words.get(path[0], set())]
    assert lacking == []


def test_the_table_itself():
    rules = room_rules()
    assert all(allowed <= set(rules) for allowed in rules.values()), "a row allows a room that has no row"
    assert [r for r in rules if "cli" in rules[r]] == ["__main__"]
    assert [r for r in rules if "trainer" in rules[r]] == ["research", "commands"]
    assert sorted(r for r in rules if "report" in rules[r]) == ["commands", "trainer"]
    assert not rules["explain"] & {"models", "weights", "predict"}


def test_rooms_import_what_the_table_allows():
    assert forbidden_rooms(sources(), room_rules()) == []


def test_libraries_stay_in_their_rooms():
    assert forbidden_libraries(sources(), library_rules()) == []


def test_no_circle():
    assert circle(sources()) == []


def test_the_checks_see_faults():
    bad = {
        "vitrail.records": "import lightning.pytorch as pl",
        "vitrail.layers.a": "def f():\n    from vitrail import cli",
        "vitrail.layers.b": "from vitrail.layers import c",
        "vitrail.layers.c": "import vitrail.layers.b\nimport numpy",
        "vitrail.draw.d": "from vitrail import create_model",
        "vitrail.cli": "import jsonargparse, torch.nn",
    }
    assert forbidden_rooms(bad, room_rules()) == [
        "vitrail.layers.a imports vitrail.cli",
        "vitrail.draw.d imports vitrail",
    ]
    assert len(forbidden_libraries(bad, library_rules())) == 3
    assert {"vitrail.layers.b", "vitrail.layers.c"} <= set(circle(bad))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vitrail", ("torch", *HEAVY)),
        ("from vitrail import VisionTransformer, create_model, record_attention", HEAVY),
    ],
)
def test_imports_are_light(statement, absent):
    """In a fresh interpreter: what a statement must not pull in."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

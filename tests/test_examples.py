"""Every example is short, and runs in this process."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PICTURES = ("last_layer_heads", "layers", "patches", "rollout")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 5
    left = sorted(str(part.relative_to(tmp_path)) for part in tmp_path.rglob("*.*"))
    assert left == ([f"out/{name}.png" for name in PICTURES] if path.stem == "attention_analysis" else [])


def test_examples_are_short_and_say_how_to_run_them():
    assert {path.stem for path in EXAMPLES} >= {
        "attention_analysis",
        "classification",
        "components",
        "transfer_learning",
    }
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, path.name
        assert f"python examples/{path.name}" in text.split('"""')[1], path.name

"""Every block of README.md and docs/*.md runs: Python, and lines that begin with `vitrail`.

The blocks of one file run in order, in one namespace and one fresh folder that holds a `photo.jpg`, a small image
folder `photos/`, a `data/cifar10/` of the true layout with made pictures, and the project's `configs/` and `examples/`.
`vitrail train` and `vitrail demo` run their recipes for one epoch of a few batches. A block under
`<!-- not run: reason -->` is left out and counted; it must still be valid.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {"console", "bash", "sh"}
FENCE = re.compile(
    r"^(?:<!--\s*not run:\s*(?P<reason>.+?)\s*-->\s*\n\s*)?"  # the comment directly above, if any
    r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    text: str
    line: int
    """of the first line inside the fence, counted from 1"""
    reason: str | None
    """why it is not run; None where it is"""


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page that name Python or a shell."""
    for match in FENCE.finditer(page):
        if match["language"] in {"python", *SHELL}:
            line = page.count("\n", 0, match.start("text")) + 1
            yield Block(match["language"], match["text"], line, match["reason"])


def commands(text: str) -> list[list[str]]:
    """The words of every `vitrail …` line: prompts, comments and line ends with a backslash taken away."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = (shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines)
    return [w[1:] for w in words if w and w[0] == "vitrail"]


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    """Executes a block; an error's traceback names the page and its line."""
    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def run_shell(block: Block) -> None:
    from vitrail.cli import main

    for words in commands(block.text):
        try:
            code = main(shortened(words))
        except SystemExit as end:
            code = end.code
        assert not code, f"`vitrail {shlex.join(words)}` ended with {code}"


def shortened(words: list[str]) -> list[str]:
    """A training command for one epoch of a few batches; any other command as it is."""
    return [*words, "--debug", "--epochs", "1"] if words[0] == "train" and "--resume" not in words else words


def write_pictures(folder: Path) -> None:
    """photo.jpg; photos/ with two classes of eight pictures, dark and bright noise; CIFAR-10's folders."""
    from PIL import Image

    def write(path: Path, low: int, size: tuple[int, int] = (64, 80)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(low, low + 120, (*size, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)

    write(folder / "photo.jpg", 60)
    for number in range(8):
        write(folder / "photos" / "dark" / f"{number}.jpg", 0)
        write(folder / "photos" / "bright" / f"{number}.jpg", 130)
    for part in ("train", "test"):
        for number in range(20):
            path = folder / "data" / "cifar10" / part / f"class{number % 10}" / f"{number}.jpg"
            write(path, 6 * number, (32, 32))
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default:.* is taken for :UserWarning")  # a page may show an ambiguous word
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    found = list(blocks(page.read_text(encoding="utf-8")))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in (b for b in found if b.reason is None):
        if block.language == "python":
            run_python(block, page, namespace)
        else:
            run_shell(block)
    left_out = [block for block in found if block.reason]
    for block in (b for b in left_out if b.language == "python"):
        compile(block.text, f"{page}:{block.line}", "exec")
    record_property("blocks_run", len(found) - len(left_out))
    record_property("blocks_not_run", len(left_out))
    print(f"{page.name}: {len(found) - len(left_out)} blocks run, {len(left_out)} not run")


def parses(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """The exit code of a command whose work is left out: only its words are read."""
    from vitrail import cli

    idle = {name: functools.wraps(command)(lambda *_, **__: None) for name, command in cli.COMMANDS.items()}
    patch.setattr(cli, "COMMANDS", idle)
    return cli.main(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page, monkeypatch):
    """Those that are not run, too; a file of `--config` must be there."""
    monkeypatch.chdir(ROOT)
    found = [words for block in blocks(page.read_text(encoding="utf-8")) for words in commands(block.text)]
    assert [shlex.join(words) for words in found if parses(words, monkeypatch) != 0] == []


def test_a_wrong_command_does_not_parse(monkeypatch):
    assert parses(["models", "vit_*"], monkeypatch) == 0
    assert parses(["predict", "photo.jpg", "--tpo", "3"], monkeypatch) == 2


PAGE = """
```python
a = 1
```
<!-- not run: needs a GPU -->

```console
$ vitrail train --model vit_tiny \\
    --epochs 3   # three
$ make test
```
```text
vitrail nothing
```
```bash
vitrail models 'vit_*'
```
"""


def test_blocks_are_found():
    python, console, bash = blocks(PAGE)
    assert (python.language, python.text, python.line, python.reason) == ("python", "a = 1\n", 3, None)
    assert (console.reason, bash.reason) == ("needs a GPU", None)
    assert commands(console.text) == [["train", "--model", "vit_tiny", "--epochs", "3"]]
    assert commands(bash.text) == [["models", "vit_*"]]


def test_an_error_names_the_page_and_the_line():
    with pytest.raises(NameError) as error:
        run_python(Block("python", "\nundefined\n", 7, None), Path("page.md"), {})
    last = error.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("page.md", 8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Relative links of a page name files of the project."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []

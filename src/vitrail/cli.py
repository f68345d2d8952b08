"""The command line: a table of typed functions. A parameter is a flag, its annotation the type and the help.

    vitrail COMMAND …           what words and flags mean stands in `vitrail.flags`

Errors of the user are one line on stderr and exit code 2; Ctrl-C is 130, a reader that has gone away 141. Of several
processes the first one speaks.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from rich.console import Console
from rich.table import Table

from vitrail.data.badimages import OnBadImage
from vitrail.flags import existing, parse
from vitrail.images import SUFFIXES
from vitrail.names import closest, nearest, printable
from vitrail.processes import is_first
from vitrail.train.config import TrainConfig

if TYPE_CHECKING:
    from vitrail.predict import ViTClassifier
    from vitrail.records import Classification

NO_MEMORY = "can't allocate memory|out of memory|not enough memory"
"""what torch says on a CPU and on an accelerator"""
SHIPPED = "bloodcells"
"""the model that answers when none is named"""
BATCH = 32
"""images that are classified at a time"""
PIPE_CLOSED = 141
"""what a shell says of a program whose reader went away: 128 and the number of SIGPIPE"""
Model = Annotated[str, "a run folder, a model folder, or a shipped model's name"]
Out = Annotated[str, "folder for the pictures, made if needed"]
SPLIT = (
    "test, val, train or all; if not said: all of a folder without parts that the model was not trained on, else test"
)


def train(
    config: TrainConfig,
    *,
    resume: Annotated[str | None, "go on with this run folder"] = None,
    override: Annotated[list[str] | None, "settings that a resumed run may change, such as lr batch_size"] = None,
) -> None:
    """Train a model; write its run folder with curves, checkpoints, the model and report.html."""
    from vitrail.trainer import resume_training, run_training

    if resume is not None and config.out != resume:
        raise ValueError(f"--resume goes on in its own folder {resume}; got --out {config.out}: leave it out")
    out = _place(config.out)
    names = override or ()
    if resume is None:
        history = run_training(config, override=names)
    else:
        history = resume_training(resume, config, override=names)
    _tell(f"epochs done: {len(history)} of {config.epochs}; the report is {out / 'report.html'}")


def demo(*, out: Annotated[str, "folder of the run"] = "runs/demo") -> None:
    """Train on the shipped blood-cell photographs in about two minutes, evaluate, explain, and write a report."""
    from vitrail.trainer import demo_config, run_training

    place = _place(out)
    run_training(demo_config(out))
    _tell(f"open {place / 'report.html'} in a browser")


def evaluate(
    model: Model,
    /,
    *,
    data: Annotated[str, "bloodcells, cifar10, cifar100, imagenet, or folder:PATH"],
    data_dir: Annotated[str, "where named data sets lie"] = "data",
    split: Annotated[str | None, SPLIT] = None,
    batch_size: Annotated[int, "images at a time"] = 128,
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
    on_bad_image: Annotated[
        OnBadImage, "end at an image that cannot be read, or leave it out of the figures"
    ] = "raise",
    as_json: Annotated[bool, "print JSON"] = False,
) -> None:
    """Measure a trained model on a data set's held-out images, or on images that it has never seen."""
    from vitrail.report import as_json as numbers
    from vitrail.trainer import evaluate_model

    found = evaluate_model(
        model, data=data, data_dir=data_dir, split=split, batch_size=batch_size, device=device,
        on_bad_image=on_bad_image,
    )  # fmt: skip
    if as_json:
        facts = {"split": found.split, "drawn": found.drawn, "images": found.images, "bad_images": found.bad_images}
        print(json.dumps(facts | {"classes": list(found.classes)} | numbers(found)))
        return
    left_out = f", {found.bad_images} could not be read" if found.bad_images else ""
    rows = {
        "split": found.split + (" (drawn)" if found.drawn else ""),
        "images": f"{found.images} of {found.total}{left_out}",
    }
    rows |= {name: f"{value:.4f}" for name, value in found.items() if value.ndim == 0}
    print("\n".join(f"{name:>20}  {value}" for name, value in rows.items()))


def predict(
    images: Annotated[list[str], "image files, or folders of them"],
    /,
    *,
    model: Model = "",
    top: Annotated[int, "classes to list"] = 5,
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
    on_bad_image: Annotated[OnBadImage, "whether files that cannot be read end in exit code 2, or in 0"] = "raise",
    as_json: Annotated[bool, "print one JSON object a line"] = False,
) -> None:
    """Classify images. Files that cannot be read are named, and the others answered."""
    paths, absent = _found(images)
    predictor = _predictor(model, device, sys.stderr if as_json else sys.stdout)
    for reason in absent:
        _say(f"no answer: {reason}")
    answered, asked = 0, len(paths) + len(absent)
    for answer in predictor.stream(paths, top, BATCH, on_bad_image="skip"):  # which names them on stderr
        print(json.dumps(answer.to_dict()) if as_json else _line(answer), flush=True)
        answered += 1
    if answered == asked:
        return
    bad = f"{asked - answered} of {asked} images could not be read"
    if on_bad_image == "raise":
        raise ValueError(f"{bad}: mend or leave out what is named above, or take --on-bad-image skip")
    _say(bad)


def explain(
    images: Annotated[list[str], "image files, or folders of them"],
    /,
    *,
    model: Model = "",
    method: Annotated[str, "rollout or attention"] = "rollout",
    layers: Annotated[list[int] | None, "layers to show, counted from 1; all by default"] = None,
    heads: Annotated[str, "mean, max, min, all, or a head's number from 0"] = "mean",
    out: Out = "out",
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
) -> None:
    """Draw where a model looked."""
    from vitrail.visualize import AttentionVisualizer

    paths, place = _expand(images), _place(out)
    visualizer = AttentionVisualizer(_predictor(model, device, sys.stdout))
    for image, name in zip(paths, _names(paths), strict=True):
        for path in visualizer.save(image, place, name=name, method=method, layers=layers, heads=heads):
            print(printable(str(path)), flush=True)


def models(pattern: Annotated[str, "shell pattern, such as 'vit_*'"] = "*", /) -> None:
    """List the models that can be built, with their exact parameter counts at 1000 classes or as named."""
    from vitrail.models.registry import list_models, model_table

    if not list_models(pattern):
        raise ValueError(f"no model matches {pattern!r}; the nearest are {', '.join(nearest(pattern, list_models()))}")
    table = Table("model", "parameters", "image size", "classes", box=None)
    for row in model_table(pattern):
        table.add_row(row.name, f"{row.parameters:,}", f"{row.img_size[0]} x {row.img_size[1]}", str(row.num_classes))
    console = Console(width=None if sys.stdout.isatty() else 100)
    with console.capture() as shown:  # its own end where nobody reads is another one
        console.print(table)
    print(shown.get(), end="")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "explain": explain,
    "models": models,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _notes(), _written():
            return _run(words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return PIPE_CLOSED
    except OSError as error:
        place = f"{error.filename} cannot be read or written" if error.filename else "a file"
        return _mistake(error, f"{place}: {error.strerror or error}: name another, or mend what is said")
    except ValueError as error:
        return _mistake(error, str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        mend = "a smaller --batch-size, --img-size or model needs less"
        return _mistake(error, f"there is too little memory: {mend} ({error})")
    except KeyboardInterrupt as stop:
        return _stopped(stop)


def _mistake(error: Exception, said: str) -> int:
    """Says what is wrong, and what was noted on the way, such as what is done already; returns the exit code."""
    _say("; ".join([f"error: {said}", *_noted(error)]))
    return 2


def _noted(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _stopped(stop: KeyboardInterrupt) -> int:
    """The exit code of an interruption. That of a training run says how to go on."""
    for note in _noted(stop):
        _tell(note)
    if not stop.args:
        return 130
    from vitrail.train.engine import Interrupted  # loaded already, since it says something

    _tell(str(stop))
    return stop.exit_code if isinstance(stop, Interrupted) else 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(version("vitrail"))
        return 0
    if words[0] not in COMMANDS:
        close = closest(words[0], COMMANDS)
        mend = f": did you mean {close}?" if close else ""
        raise ValueError(f"vitrail has the commands {', '.join(COMMANDS)}; got {words[0]!r}{mend}")
    command = COMMANDS[words[0]]
    positional, flags = parse(f"vitrail {words[0]}", command, words[1:])
    command(*positional, **flags)
    return 0


def _overview() -> str:
    lines = [f"  {name:<9} {(inspect.getdoc(function) or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: vitrail COMMAND …", "", *lines, "", "vitrail COMMAND --help lists a command's flags."])


def _predictor(model: str, device: str, stream: TextIO) -> ViTClassifier:
    """The model that is named; where none is, the shipped one, which then says what it is and for what images."""
    from vitrail.predict import ViTClassifier

    predictor = ViTClassifier.from_pretrained(model or SHIPPED, device=device)
    if not model:
        print(f"model: {SHIPPED} ({predictor.model.variant}), for {predictor.model.images}", file=stream, flush=True)
    return predictor


def _line(answer: Classification) -> str:
    rest = ", ".join(f"{label} {share:.1%}" for label, share in answer.top[1:])
    return printable(f"{answer.id}  {answer}" + (f"  ({rest})" if rest else ""))


def _place(out: str) -> Path:
    """What `--out` names. Raises `ValueError` before any work where that can be no folder that may be written to."""
    path = Path(out)
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    fault = "is no folder" if not there.is_dir() else "" if os.access(there, os.W_OK) else "may not be written to"
    if fault:
        raise ValueError(
            f"--out must name a folder, which is made if needed; got {out}, and {there} {fault}: name another"
        )
    return path


def _expand(paths: Sequence[str]) -> list[Path]:
    """Files as they are, folders as the image files in them, in the order of their names; not those further down."""
    found = []
    for path in map(existing, map(Path, paths)):
        inside = sorted(filter(_is_named_as_image, path.iterdir())) if path.is_dir() else [path]
        deeper = _deeper(path) if path.is_dir() else ""
        if not inside:
            raise ValueError(f"{path}: the folder holds no image file ({', '.join(sorted(SUFFIXES))}){deeper}")
        if deeper:
            _say(f"{path}: the folder's own images are taken{deeper}")
        found += inside
    return found


def _is_named_as_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _deeper(folder: Path) -> str:
    """That images in sub-folders are left alone, and how to have them; empty where there are none."""
    below = sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    places = [image.parent for part in below if (image := next(filter(_is_named_as_image, part.rglob("*")), None))]
    return f"; sub-folders are not searched: name those that hold images, such as {places[0]}" if places else ""


def _found(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What `_expand` finds, and why it finds nothing for some. Raises `ValueError` where it finds nothing at all."""
    found, absent = [], []
    for path in paths:
        try:
            found += _expand([path])
        except ValueError as error:
            absent.append(str(error))
    if not found:
        raise ValueError("; ".join(absent))
    return found, absent


def _names(images: Sequence[Path]) -> list[str]:
    """What the pictures of each image are called: its stem, or, where images share one, the path that tells them apart.

    a/cat.jpg b/cat.jpg b/dog.jpg -> a_cat_jpg, b_cat_jpg, dog
    """
    whole = [image.absolute() for image in images]
    shared = Counter(path.stem for path in set(whole))
    top = os.path.commonpath([path.parent for path in whole])
    apart = ["_".join((*path.relative_to(top).parent.parts, path.name.replace(".", "_"))) for path in whole]
    return [path.stem if shared[path.stem] == 1 else name for path, name in zip(whole, apart, strict=True)]


def _say(line: str) -> None:
    """For the person at the terminal, in one line; stdout is for answers."""
    print(printable(" ".join(part.strip() for part in line.splitlines())), file=sys.stderr)


def _tell(line: str) -> None:
    """What every one of several processes would say: the first one does."""
    if is_first():
        _say(line)


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    _tell(f"note: {message}")


class _Log(logging.Handler):
    """What the package tells its logger, for the person at the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.getMessage())


@contextmanager
def _written() -> Iterator[None]:
    """What was printed is handed on before the end, so that a reader who has gone away is noticed here."""
    try:
        yield
    finally:
        sys.stdout.flush()


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings, and what the logger `vitrail` is told, on stderr. Both are as they were afterwards."""
    log, handler = logging.getLogger("vitrail"), _Log()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)

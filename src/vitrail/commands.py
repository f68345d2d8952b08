"""What the command line does: a typed function a command. A parameter is a flag, its annotation type and help."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from rich.console import Console
from rich.table import Column, Table

from vitrail.data.badimages import OnBadImage
from vitrail.flags import existing
from vitrail.images import SUFFIXES
from vitrail.names import check_choice, nearest, printable
from vitrail.processes import is_first
from vitrail.train.config import TrainConfig

if TYPE_CHECKING:
    from vitrail.predict import ViTClassifier
    from vitrail.records import Classification

SHIPPED = "bloodcells"
"""the model that answers when none is named"""
BATCH = 32
"""images that are classified at a time"""
Model = Annotated[str, "a run folder, a model folder, or a shipped model's name"]
Out = Annotated[str, "folder for the pictures, made if needed"]
WIDEST = 10_000
"""columns of a table that no terminal shows: as wide as it likes"""
SPLIT = (
    "test, val, train or all; if not said: all of a folder without parts that the model was not trained on, else test"
)


def train(
    config: TrainConfig,
    *,
    resume: Annotated[str | None, "go on with this run folder"] = None,
    override: Annotated[list[str] | None, "settings that a resumed run may change, such as lr batch_size"] = None,
    allow_world_change: Annotated[bool, "go on with other --devices or --num-nodes; steps keep their images"] = False,
) -> None:
    """Train a model; write its run folder with curves, checkpoints, the model and report.html."""
    from vitrail.trainer import resume_training, run_training

    if resume is not None and config.out != resume:
        raise ValueError(f"--resume goes on in its own folder {resume}; got --out {config.out}: leave it out")
    out = out_folder(config.out)
    names = override or ()
    if resume is None and allow_world_change:
        raise ValueError("--allow-world-change is for a run that is gone on with: name its folder with --resume")
    if resume is None:
        history = run_training(config, override=names)
    else:
        history = resume_training(resume, config, override=names, allow_world_change=allow_world_change)
    tell(f"epochs done: {len(history)} of {config.epochs}; the report is {out / 'report.html'}")


def demo(*, out: Annotated[str, "folder of the run"] = "runs/demo") -> None:
    """Train on the shipped blood-cell photographs in about two minutes, evaluate, explain, and write a report."""
    from vitrail.trainer import demo_config, run_training

    place = out_folder(out)
    run_training(demo_config(out))
    tell(f"open {place / 'report.html'} in a browser")


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
    from vitrail.evaluation import evaluate_model
    from vitrail.report import as_json as numbers

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
        say(f"no answer: {reason}")
    answered, asked = 0, len(paths) + len(absent)
    for answer in predictor.stream(paths, top, BATCH, on_bad_image="skip"):  # which names them on stderr
        print(json.dumps(answer.to_dict()) if as_json else _line(answer), flush=True)
        answered += 1
    if answered == asked:
        return
    bad = f"{asked - answered} of {asked} images could not be read"
    if on_bad_image == "raise":
        raise ValueError(f"{bad}: mend or leave out what is named above, or take --on-bad-image skip")
    say(bad)


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
    from vitrail.predict import Predictor
    from vitrail.visualize import AttentionVisualizer

    paths, place = _expand(images), out_folder(out)
    named = Predictor.from_pretrained(model, device) if model else _predictor(model, device, sys.stdout)
    visualizer = AttentionVisualizer(named)
    for image, name in zip(paths, _names(paths), strict=True):
        for path in visualizer.save(image, place, name=name, method=method, layers=layers, heads=heads):
            print(printable(str(path)), flush=True)


def models(
    pattern: Annotated[str, "shell pattern, such as 'vit_*'"] = "*",
    /,
    *,
    pretrained: Annotated[bool, "list published weights instead, with licence and address"] = False,
) -> None:
    """List the models that can be built, with their exact parameter counts at 1000 classes or as named."""
    table = _published(pattern) if pretrained else _rows(pattern)
    console = Console(width=None if sys.stdout.isatty() else WIDEST)  # each row on a line of its own for programs
    with console.capture() as shown:  # its own end where nobody reads is another one
        console.print(table)
    print(shown.get(), end="")


def _rows(pattern: str) -> Table:
    from vitrail.models.registry import model_table

    check_matches(pattern)
    table = Table("model", "parameters", "image size", "classes", box=None)
    for row in model_table(pattern):
        table.add_row(row.name, f"{row.parameters:,}", f"{row.img_size[0]} x {row.img_size[1]}", str(row.num_classes))
    return table


def check_matches(pattern: str) -> None:
    from vitrail.models.registry import list_models

    if not list_models(pattern):
        raise ValueError(f"no model matches {pattern!r}; the nearest are {', '.join(nearest(pattern, list_models()))}")


def _published(pattern: str) -> Table:
    """Those whose whole name or whose row matches, for `vit_base_patch16_224` is a row of many."""
    from vitrail.weights.sources import SOURCES

    found = [source for source in SOURCES.values() if fnmatch(source.name, pattern) or fnmatch(source.row, pattern)]
    if not found:
        raise ValueError(f"no weights match {pattern!r}; the nearest are {', '.join(nearest(pattern, SOURCES))}")
    names = ("weights", "classes", "image size", "licence", "names", "from")
    table = Table(*(Column(name, overflow="fold") for name in names), box=None)
    for source in found:
        size, classes = "{} x {}".format(*source.preprocess.img_size), str(source.classes or "none")
        table.add_row(source.name, classes, size, source.licence, source.keys, source.place)
    return table


def inspect(
    file: Annotated[str, "a file of weights, a folder of one, or a shipped model's name"],
    /,
    *,
    model: Annotated[str, "a network to hold it against, such as vit_base_patch16_224"] = "",
    part: Annotated[str, "which network, where the file holds several, such as model_ema"] = "",
) -> None:
    """Say what a checkpoint is: whose names it has, which network it is for, what would not fit another."""
    from vitrail.weights.doctor import inspect as lines
    from vitrail.weights.load import SHIPPED as models_here

    path = models_here[file].folder if file in models_here else file
    for line in lines(path, model or None, part or None):
        print(printable(line))


def convert(
    source: Annotated[str, "a model folder, a file of weights, or the name of published weights"],
    out: Annotated[str, "a new folder"],
    /,
    *,
    to: Annotated[str, "timm, transformers or vitrail: whose reader will open it"] = "vitrail",
    model: Annotated[str, "the network, where a file fits several or none by itself"] = "",
) -> None:
    """Write a model as other libraries write theirs; numbers stay exactly what they are."""
    from vitrail.weights.convert import LAYOUTS, convert as write
    from vitrail.weights.load import open_weights

    check_choice("--to", to, LAYOUTS)
    print(printable(str(write(open_weights(source, model), out, to))))


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


def out_folder(out: str) -> Path:
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
            say(f"{path}: the folder's own images are taken{deeper}")
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


def say(line: str) -> None:
    """For the person at the terminal, in one line; stdout is for answers."""
    print(printable(" ".join(part.strip() for part in line.splitlines())), file=sys.stderr)


def tell(line: str) -> None:
    """What every one of several processes would say: the first one does."""
    if is_first():
        say(line)

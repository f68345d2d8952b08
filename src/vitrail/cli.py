"""The command line: a table of typed functions. A parameter is a flag, its annotation the type and the help.

    vitrail COMMAND …           flags take - and _, and other libraries' spellings; a wrong one names the nearest

Errors of the user are one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from vitrail.images import SUFFIXES
from vitrail.names import TRAIN_SPELLINGS, nearest
from vitrail.train.config import TrainConfig

if TYPE_CHECKING:
    from vitrail.predict import ViTClassifier

BARE = {"json": "true", "debug": "true", "download": "true", "auto_augment": "auto"}
"""flags that may stand without a value, and what they mean then"""
TRUTHS = {"true", "false", "yes", "no"}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}
SHIPPED = "bloodcells"
"""the model that answers when none is named"""
Model = Annotated[str, "a run folder, a model folder, or a shipped model's name"]
Out = Annotated[str, "folder for the pictures, made if needed"]


def train(config: TrainConfig, *, resume: Annotated[str | None, "go on with this run folder"] = None) -> None:
    """Train a model; write its run folder with curves, checkpoints, the model and report.html."""
    from vitrail.trainer import resume_training, run_training

    if resume is not None and config.out != resume:
        raise ValueError(f"--resume goes on in its own folder {resume}; got --out {config.out}: leave it out")
    history = run_training(config) if resume is None else resume_training(resume, config)
    _say(f"{len(history)} of {config.epochs} epochs are done; the report is {Path(config.out) / 'report.html'}")


def demo(*, out: Annotated[str, "folder of the run"] = "runs/demo") -> None:
    """Train on the shipped blood-cell photographs in about two minutes, evaluate, explain, and write a report."""
    from vitrail.trainer import demo_config, run_training

    run_training(demo_config(out))
    _say(f"open {Path(out) / 'report.html'} in a browser")


def evaluate(
    model: Model,
    /,
    *,
    data: Annotated[str, "bloodcells, cifar10, cifar100, imagenet, or folder:PATH"],
    data_dir: Annotated[str, "where named data sets lie"] = "data",
    split: Annotated[str, "test, val or train"] = "test",
    batch_size: Annotated[int, "images at a time"] = 128,
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
    as_json: Annotated[bool, "print JSON"] = False,
) -> None:
    """Measure a trained model on a data set's held-out images."""
    from vitrail.report import as_json as numbers
    from vitrail.trainer import evaluate_model

    figures = evaluate_model(model, data=data, data_dir=data_dir, split=split, batch_size=batch_size, device=device)
    if as_json:
        print(json.dumps(numbers(figures)))
        return
    for name, value in figures.items():
        if value.ndim == 0:
            print(f"{name:>20}  {value:.4f}")


def predict(
    images: Annotated[list[str], "image files, or folders of them"],
    /,
    *,
    model: Model = "",
    top: Annotated[int, "classes to list"] = 5,
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
    as_json: Annotated[bool, "print one JSON object a line"] = False,
) -> None:
    """Classify images."""
    paths = _expand(images)
    predictor = _predictor(model, device, sys.stderr if as_json else sys.stdout)
    for answer in predictor.predict(paths, top=top):
        rest = ", ".join(f"{label} {share:.1%}" for label, share in answer.top[1:])
        print(json.dumps(answer.to_dict()) if as_json else f"{answer.id}  {answer}" + (f"  ({rest})" if rest else ""))


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

    paths = _expand(images)
    visualizer = AttentionVisualizer(_predictor(model, device, sys.stdout))
    for image, name in zip(paths, _names(paths), strict=True):
        for path in visualizer.save(image, Path(out), name=name, method=method, layers=layers, heads=heads):
            print(path)


def models(pattern: Annotated[str, "shell pattern, such as 'vit_*'"] = "*", /) -> None:
    """List the models that can be built, with their exact parameter counts at 1000 classes or as named."""
    from vitrail.models.registry import list_models, model_table

    if not list_models(pattern):
        raise ValueError(f"no model matches {pattern!r}; the nearest are {', '.join(nearest(pattern, list_models()))}")
    table = Table("model", "parameters", "image size", "classes", box=None)
    for row in model_table(pattern):
        table.add_row(row.name, f"{row.parameters:,}", f"{row.img_size[0]} x {row.img_size[1]}", str(row.num_classes))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


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
        with warnings.catch_warnings():
            warnings.showwarning = _note
            return _run(words)
    except OSError as error:
        _say(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return 2
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        return _stopped(stop)


def _stopped(stop: KeyboardInterrupt) -> int:
    """The exit code of an interruption. That of a training run says how to go on."""
    if not stop.args:
        return 130
    from vitrail.train.engine import Interrupted  # loaded already, since it says something

    _say(str(stop))
    return stop.exit_code if isinstance(stop, Interrupted) else 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(version("vitrail"))
        return 0
    if words[0] not in COMMANDS:
        close = nearest(words[0], COMMANDS, 1)[0]
        raise ValueError(f"vitrail has the commands {', '.join(COMMANDS)}; got {words[0]!r}: did you mean {close}?")
    command = COMMANDS[words[0]]
    positional, flags = _parse(words[0], command, words[1:])
    command(*positional, **flags)
    return 0


def _overview() -> str:
    lines = [f"  {name:<9} {(inspect.getdoc(function) or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: vitrail COMMAND …", "", *lines, "", "vitrail COMMAND --help lists a command's flags."])


# ---- from a function's signature to a parser, and from words to its arguments


def _parse(name: str, command: Callable[..., None], words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments that `words` mean for `command`."""
    parser = _Parser(prog=f"vitrail {name}", description=inspect.getdoc(command), exit_on_error=False)
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    for parameter in parameters.values():
        _add(parser, parameter, hints[parameter.name])
    words = _spelled(parser, words)
    found = _read(parser, words)
    if any(is_dataclass(hints[p]) for p in parameters):
        parser.set_defaults(_saved(found["config"], found["resume"]))
        found = _read(parser, words)
    positional, flags = [], {}
    for parameter in parameters.values():
        if is_dataclass(kind := hints[parameter.name]):
            positional.append(kind(**{f.name: found[f.name] for f in fields(kind)}))  # type: ignore[operator]
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(found[parameter.name])
        else:
            flags[parameter.name] = found[_flag(parameter.name)]
    return positional, flags


class _Parser(ArgumentParser):
    """Shows flags with dashes; underscores are taken as well."""

    def format_help(self, formatter: Any = None) -> str:
        text = super().format_help(formatter)
        return re.sub(r"(?<![\w-])--(\w+)", lambda m: "--" + m[1].replace("_", "-"), text)


def _flag(parameter: str) -> str:
    return parameter.removeprefix("as_")


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any) -> None:
    if isinstance(hint, type) and is_dataclass(hint):
        parser.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags on the command line win")
        for part in reversed([base for base in hint.__mro__ if is_dataclass(base)]):
            _add_settings(parser, part)
        return
    kind, text = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    item = _list_item(kind)
    options: dict[str, Any] = {"type": item or kind, "help": text}
    if item:
        options["nargs"] = "+"
    if parameter.default is not parameter.empty:
        options["default"] = parameter.default
    if parameter.kind is not parameter.POSITIONAL_ONLY:
        required = parameter.default is parameter.empty
        parser.add_argument(f"--{_flag(parameter.name)}", required=required, **options)
    else:
        parser.add_argument(parameter.name, **({"nargs": "?", **options} if "default" in options else options))


def _add_settings(parser: ArgumentParser, part: type) -> None:
    """A flag for every field that this part of a config adds, in a group of its own, helped by its docstring."""
    docs = {found.arg_name: found.description or "" for found in parse_from_object(part).params}
    group = parser.add_argument_group((inspect.getdoc(part) or "").splitlines()[0].rstrip("."))
    for name, kind in get_type_hints(part).items():
        if name in part.__annotations__:
            default = part.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            group.add_argument(f"--{name}", type=kind, default=default, help=docs.get(name, "").replace("%", "%%"))


def _list_item(kind: Any) -> type | None:
    """`list[int]` or `list[int] | None` -> int; anything else -> None."""
    for choice in (kind, *get_args(kind)):
        if get_origin(choice) is list:
            return get_args(choice)[0]
    return None


def _saved(config: str | None, resume: str | None) -> dict[str, Any]:
    """What the file of `--config`, or the run of `--resume`, says: it stands where no flag speaks."""
    if config and resume:
        raise ValueError(f"--resume {resume} goes on by its own config.yaml; got --config {config} as well: drop one")
    if config:
        return TrainConfig.from_yaml(_existing(Path(config))).changes()
    path = Path(resume or "") / "config.yaml"
    if resume is None or not path.is_file():  # which the command itself refuses
        return {"out": resume} if resume else {}
    return {**TrainConfig.from_yaml(path).changes(), "out": resume}


def _spelled(parser: ArgumentParser, words: list[str]) -> list[str]:
    """`words` with flags in our spelling, and values for the flags that may stand bare."""
    known = {option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")}
    result: list[str] = []
    said: dict[str, str] = {}
    for i, word in enumerate(words):
        if not word.startswith("--"):
            result.append(word)
            continue
        typed, equals, value = word[2:].partition("=")
        typed = typed.replace("-", "_")
        name = typed if typed in known else TRAIN_SPELLINGS.get(typed, typed)
        if name not in known:
            close = nearest(name, known, 1)[0]
            raise ValueError(f"{parser.prog} has no flag {word}: did you mean {_dashed(close)}?")
        if said.setdefault(name, typed) != typed:
            both = f"{_dashed(said[name])} and {_dashed(typed)}"
            raise ValueError(f"{parser.prog} takes one spelling of {_dashed(name)}; got {both}: drop one")
        bare = name in BARE and not equals and not _is_value(name, words[i + 1 : i + 2])
        result.append(f"--{name}={BARE[name]}" if bare else f"--{name}{equals}{value}")
    return result


def _is_value(flag: str, following: list[str]) -> bool:
    """Whether the word after a flag that may stand bare is meant for it."""
    if BARE[flag] == "true":
        return bool(following) and following[0].lower() in TRUTHS
    return bool(following) and not following[0].startswith("-")


def _dashed(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _read(parser: ArgumentParser, words: list[str]) -> Namespace:
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        raise ValueError(_complaint(parser, " ".join(str(error).split()))) from None


def _complaint(parser: ArgumentParser, text: str) -> str:
    """jsonargparse's words for a wrong value or a missing one: the flag, the rule and what was got, in one line."""
    if needed := re.search(r"arguments are required: (.*)", text):
        flags = {action.dest for action in parser._actions if action.option_strings}
        names = [_dashed(name) if name in flags else name for name in needed[1].split(", ")]
        return f"{parser.prog} needs {', '.join(names)}; see {parser.prog} --help"
    if alone := re.search(r"argument --(\w+): (.*)", text):
        return f"{_dashed(alone[1])}: {alone[2]}"
    wrong = re.search(r'key "(\w+)"(.*?)(?:Got|Given) value: (.*)', text)
    if not wrong:
        return f"{parser.prog}: {text}"
    flag, expected, got = wrong.groups()
    if choices := re.findall(r"'(\w+)'", expected.partition("Literal")[2]):
        close = nearest(got, choices, 1)[0]
        return f"{_dashed(flag)} must be one of {', '.join(choices)}; got {got}: did you mean {close}?"
    rule = " or ".join(rule for kind, rule in KINDS.items() if f"<class '{kind}'>" in expected)
    return f"{_dashed(flag)} takes {rule}; got {got}"


def _predictor(model: str, device: str, stream: TextIO) -> ViTClassifier:
    """The model that is named; where none is, the shipped one, which then says what it is and for what images."""
    from vitrail.predict import ViTClassifier

    predictor = ViTClassifier.from_pretrained(model or SHIPPED, device=device)
    if not model:
        print(f"model: {SHIPPED} ({predictor.model.variant}), for {predictor.model.images}", file=stream)
    return predictor


def _expand(paths: Sequence[str]) -> list[Path]:
    """Files as they are, folders as the image files in them, in the order of their names."""
    found = []
    for path in map(_existing, map(Path, paths)):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: the folder holds no image file ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


def _existing(path: Path) -> Path:
    """`path`, where something is. Raises `ValueError` naming the nearest that is beside it."""
    if path.exists():
        return path
    beside = (part.name for part in path.parent.iterdir()) if path.parent.is_dir() else ()
    close = nearest(path.name, beside, 1)
    hint = f"the nearest is {path.parent / close[0]}" if close else f"nor anything in {path.parent}"
    raise ValueError(f"there is no {path}; {hint}")


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
    """For the person at the terminal; stdout is for answers."""
    print(line, file=sys.stderr)


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"note: {message}")

"""From a function's signature to a parser, and from words to the function's arguments. Knows no command.

    parameter ── annotation ──> a flag, its type and its help          words ── spelling, parser ──> arguments

Flags take - and _, and other libraries' spellings; a wrong one names the one that was probably meant.
"""

from __future__ import annotations

import inspect
import re
from argparse import Action, ArgumentError
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from vitrail.names import TRAIN_SPELLINGS, closest, nothing, our_word, settled

BARE_WORDS = {"auto_augment": "auto"}
"""flags beside switches that may stand without a value, and what they mean then"""
TRUTHS = {"true", "false", "yes", "no"}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "none"}


def parse(prog: str, command: Callable[..., None], words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments that `words` mean for `command`.

    A parameter whose type is a dataclass (with `from_yaml` and `changes`) is a flag for each of its fields, and
    `--config`, a file of them. Raises `ValueError` in one line for words that mean nothing, or two things.
    """
    parser = _Parser(prog=prog, description=inspect.getdoc(command), exit_on_error=False)
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    for parameter in parameters.values():
        _add(parser, parameter, hints[parameter.name])
    words = _spelled(parser, words)
    found = _read(parser, words)
    for kind in (hints[name] for name in parameters if is_dataclass(hints[name])):
        saved = _saved(kind, found["config"], found.get("resume"))
        parser.set_defaults({name: list(v) if isinstance(v, tuple) else v for name, v in saved.items()})
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


class _Help(DefaultHelpFormatter):
    """Meaning and default. Types speak Python, and the choices stand beside the flag."""

    def _get_type_str(self, action: Action) -> None:
        return None


class _Parser(ArgumentParser):
    """Shows flags with dashes, and `none`; underscores, and `null`, are taken as well."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, **settings)
        self.bare: dict[str, str] = {}
        """flags that may stand without a value, and what they mean then"""
        self.optional: set[str] = set()
        """flags that take a number or a truth, or none"""

    def add_flag(self, group: Any, name: str, kind: Any, **options: Any) -> None:
        """A flag of this type in a group of this parser; one that is false until it is said may stand bare."""
        if kind is bool and options.get("default") is False:
            self.bare[name] = "true"
        elif name in BARE_WORDS:
            self.bare[name] = BARE_WORDS[name]
        if NoneType in get_args(kind) and str not in get_args(kind):
            self.optional.add(name)
        if get_origin(kind) is tuple:  # of any length
            kind, options = get_args(kind)[0], {**options, "nargs": "+", "default": list(options["default"])}
        group.add_argument(f"--{name}", type=kind, **options)

    def flags(self) -> set[str]:
        """The names of all flags, with underscores."""
        return {name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")}

    def format_help(self, formatter: Any = None) -> str:
        text = re.sub(r"\bnull\b", "none", super().format_help(formatter))
        return re.sub(r"(?<![\w-])--(\w+)", lambda m: "--" + m[1].replace("_", "-"), text)


def _flag(parameter: str) -> str:
    return parameter.removeprefix("as_")


def _add(parser: _Parser, parameter: inspect.Parameter, hint: Any) -> None:
    if isinstance(hint, type) and is_dataclass(hint):
        parser.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags on the command line win")
        for part in reversed([base for base in hint.__mro__ if is_dataclass(base)]):
            _add_settings(parser, part)
        return
    kind, text = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    item = _list_item(kind)
    options: dict[str, Any] = {"help": text}
    if item:
        options["nargs"] = "+"
    if parameter.default is not parameter.empty:
        options["default"] = parameter.default
    if parameter.kind is not parameter.POSITIONAL_ONLY:
        required = parameter.default is parameter.empty
        parser.add_flag(parser, _flag(parameter.name), item or kind, required=required, **options)
    else:
        optional = {"nargs": "?"} if "default" in options else {}
        parser.add_argument(parameter.name, type=item or kind, **(optional | options))


def _add_settings(parser: _Parser, part: type) -> None:
    """A flag for every field that this part of a config adds, in a group of its own, helped by its docstring."""
    docs = {found.arg_name: found.description or "" for found in parse_from_object(part).params}
    group = parser.add_argument_group((inspect.getdoc(part) or "").splitlines()[0].rstrip("."))
    for name, kind in get_type_hints(part).items():
        if name in part.__annotations__:
            default = part.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            parser.add_flag(group, name, kind, default=default, help=docs.get(name, "").replace("%", "%%"))


def _list_item(kind: Any) -> type | None:
    """`list[int]` or `list[int] | None` -> int; anything else -> None."""
    for choice in (kind, *get_args(kind)):
        if get_origin(choice) is list:
            return get_args(choice)[0]
    return None


def _saved(kind: Any, config: str | None, resume: str | None) -> dict[str, Any]:
    """What the file of `--config`, or the run of `--resume`, says: it stands where no flag speaks."""
    if config and resume:
        raise ValueError(f"--resume {resume} goes on by its own config.yaml; got --config {config} as well: drop one")
    if config:
        return kind.from_yaml(existing(Path(config))).changes()
    path = Path(resume or "") / "config.yaml"
    if resume is None or not path.is_file():  # which the command itself refuses
        return {"out": resume} if resume else {}
    return {**kind.from_yaml(path).changes(), "out": resume}


def _spelled(parser: _Parser, words: list[str]) -> list[str]:
    """`words` with flags in our spelling, and values for the flags that may stand bare. After `--` none is a flag."""
    result: list[str] = []
    said: dict[str, str] = {}
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        if not word.startswith("--"):
            optional = i > 0 and result[-1].removeprefix("--") in parser.optional
            result.append("null" if optional and nothing(word) else word)
            continue
        typed, equals, value = word[2:].partition("=")
        typed = typed.replace("-", "_")
        name = _known(parser, typed)
        if said.setdefault(name, typed) != typed:
            both = f"{_dashed(said[name])} and {_dashed(typed)}"
            raise ValueError(f"{parser.prog} takes one spelling of {_dashed(name)}; got {both}: drop one")
        meant = None if equals else parser.bare.get(name)
        bare = meant is not None and not _is_value(meant, words[i + 1 : i + 2])
        value = "null" if name in parser.optional and nothing(value) else value
        result.append(f"--{name}={meant}" if bare else f"--{name}{equals}{value}")
    return result + words[end:]


def _known(parser: _Parser, typed: str) -> str:
    """The flag that the user's word means. Raises `ValueError` with the one that was probably meant, or the reason."""
    flags = parser.flags()
    if name := our_word(typed, flags, TRAIN_SPELLINGS, parser.prog):
        return name
    if reason := settled(typed, flags):
        raise ValueError(f"{parser.prog} takes no {_dashed(typed)}: {reason}")
    close = closest(typed, flags)
    mend = f"did you mean {_dashed(close)}?" if close else f"see {parser.prog} --help"
    raise ValueError(f"{parser.prog} has no flag {_dashed(typed)}: {mend}")


def _is_value(meant: str, following: list[str]) -> bool:
    """Whether the word after a flag that may stand bare, where it means `meant`, is its value."""
    if meant == "true":
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
        close = closest(got, choices)
        mend = f": did you mean {close}?" if close else ""
        return f"{_dashed(flag)} must be one of {', '.join(choices)}; got {got}{mend}"
    rule = " or ".join(rule for kind, rule in KINDS.items() if f"<class '{kind}'>" in expected)
    return f"{_dashed(flag)} takes {rule}; got {got}{_place(parser, flag)}"


def _place(parser: ArgumentParser, flag: str) -> str:
    """Where the words without a flag go, for a flag of several values, which takes all that follow it."""
    greedy = any(action.dest == flag and action.nargs == "+" for action in parser._actions)
    free = [action.dest for action in parser._actions if not action.option_strings]
    return f": put {free[0]} before {_dashed(flag)}, or after --" if greedy and free else ""


def existing(path: Path) -> Path:
    """`path`, where something is. Raises `ValueError` naming what is beside it under a name like it."""
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise ValueError(f"there is no {path}, nor the folder {path.parent}")
    close = closest(path.name, (part.name for part in path.parent.iterdir()))
    hint = f"the nearest is {path.parent / close}" if close else "nothing beside it has a name like that"
    raise ValueError(f"there is no {path}; {hint}")

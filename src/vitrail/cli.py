"""The command line: words -> a function of `vitrail.commands` or `vitrail.studies`, and what it ends with.

    vitrail COMMAND …           what words and flags mean stands in `vitrail.flags`

Errors of the user are one line on stderr and exit code 2; Ctrl-C is 130, a reader that has gone away 141. Of several
processes the first one speaks.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from vitrail import commands, studies
from vitrail.commands import say, tell
from vitrail.flags import parse
from vitrail.names import closest

NO_MEMORY = "can't allocate memory|out of memory|not enough memory"
"""what torch says on a CPU and on an accelerator"""
PIPE_CLOSED = 141
"""what a shell says of a program whose reader went away: 128 and the number of SIGPIPE"""
COMMANDS: dict[str, Callable[..., None]] = {
    "train": commands.train,
    "eval": commands.evaluate,
    "predict": commands.predict,
    "explain": commands.explain,
    "models": commands.models,
    "inspect": commands.inspect,
    "convert": commands.convert,
    "parity": studies.parity,
    "transfer": studies.transfer,
    "ablate": studies.ablate,
    "tune": studies.tune,
    "demo": commands.demo,
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
    say("; ".join([f"error: {said}", *_noted(error)]))
    return 2


def _noted(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _stopped(stop: KeyboardInterrupt) -> int:
    """The exit code of an interruption. That of a training run says how to go on."""
    for note in _noted(stop):
        tell(note)
    if not stop.args:
        return 130
    from vitrail.train.engine import Interrupted  # loaded already, since it says something

    tell(str(stop))
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


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(f"note: {message}")


class _Log(logging.Handler):
    """What the package tells its logger, for the person at the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


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

"""`vitrail tune`: which settings are best for these images, searched by Optuna, a run for each trial.

    SPACE ── sampler ──> settings ── run, pruned where it falls behind ──> best validation figure ──┐
      └──────────────────── what all trials so far came to (study.log) <─────────────────────────────┘

What is chosen, is chosen by validation images alone: no trial looks at a test image, which are for whoever trains with
`best.yaml` afterwards. All trials have one seed, one draw of the parts and all other settings in common. The sampler is
the Tree-structured Parzen Estimator (Bergstra et al. 2011, NIPS), seeded anew for each trial by its number, so that a
search which was stopped and gone on with proposes what it would have proposed. Of pruners, `median` ends a trial whose
best figure is below the median of the others at its epoch; `hyperband` gives many trials few epochs and few trials many
(Li et al. 2018, JMLR 18).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vitrail.files import write_whole
from vitrail.names import TRAIN_SPELLINGS, check_choice, closest, nothing, our_word, require
from vitrail.records import History
from vitrail.research.ablate import history_of
from vitrail.tasks.classify import Classify
from vitrail.train.callbacks import Watch
from vitrail.train.changes import FREE
from vitrail.train.checkpoint import has_checkpoints
from vitrail.train.claim import claimed
from vitrail.train.config import RESTING, TrainConfig
from vitrail.train.finetune import freezing
from vitrail.train.finite import NonFiniteLoss
from vitrail.trainer import resume_training, run_training

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

LOG = logging.getLogger("vitrail")
FIGURE, MODE = f"val_{Classify.monitor[0]}", Classify.monitor[1]
FIXED = FREE | {"data", "seed", "val_fraction", "debug", "devices", "num_nodes"}
"""settings that no trial may have for itself: those that teach nothing, and by which it would be judged otherwise"""
FEW = 4
"""trials below which nothing is said of what mattered"""


class Span(NamedTuple):
    """All numbers between two; `log` draws their logarithms evenly."""

    low: float
    high: float
    log: bool = False


class Choice(NamedTuple):
    """One of some values."""

    values: tuple[Any, ...]


Space = Mapping[str, Span | Choice]


class Row(NamedTuple):
    """One trial."""

    number: int
    state: str
    """complete, pruned, failed or running"""
    value: float | None
    """its best validation figure so far"""
    epochs: int
    seconds: float
    settings: Mapping[str, Any]


class Found(NamedTuple):
    """Where a search stands."""

    rows: tuple[Row, ...]
    """as they were tried"""
    importance: Mapping[str, float]
    """share of each setting in what complete trials differ by; empty for few of them"""
    best: TrainConfig | None
    """None until a trial is complete"""


class TimeUp(Exception):
    """Ends a trial from within, which is gone on with when the search is."""


def tune(
    config: TrainConfig, search: Sequence[str] = (), trials: int = 20, pruner: str = "median"
) -> Iterator[Found]:  # fmt: skip
    """Searches until there are so many trials, in all, in `config.out`; yields where it stands, first as it is found.

    `search` has words such as `lr=1e-4..1e-2:log`, `drop_path=0..0.3` and `optimizer=adamw,muon`; without any, the
    space is `usual_space`. A trial is a run in `config.out`/NUMBER; the best one's settings stand in `best.yaml`. One
    that diverges, or needs more memory than there is, has failed. With `config.max_minutes`, the search stops before
    the epoch that would pass it. What was stopped is gone on with: call it again.

    Raises `ValueError` for a space that is none, for a search in `config.out` that was told something else, where
    another process searches there, if Optuna is missing, and as `run_training` does.
    """
    _optuna()
    require(trials >= 1, "trials", "be at least 1", trials)
    check_choice("--pruner", pruner, PRUNERS)
    alone = config.devices * config.num_nodes == 1
    require(alone, "devices", "be 1 for a search, whose trials are runs of one process", config.devices)
    space = search_space(search or usual_space(config), config)
    out, until = Path(config.out), time.monotonic() + 60 * (config.max_minutes or math.inf)
    with claimed(out):
        study = _study(config, space, pruner)
        found = _found(study, config)
        yield found
        while time.monotonic() < until and (trial := _next(study, config, trials)):
            try:
                _try(study, trial, config, space, until)
            except TimeUp:
                LOG.info("the time is up within trial %d, which the same search goes on with", trial.number)
                return
            found = _found(study, config)
            _keep_best(study, found, out)
            yield found


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError(
            "vitrail tune needs the optuna package; it is not installed: pip install 'vitrail[tune]'"
        ) from error
    return optuna


def usual_space(config: TrainConfig) -> list[str]:
    """A space about the recipe's own rate and weight decay, with what keeps it from learning images by heart."""
    numbers, words = config.numbers(), []
    for name, value in (("lr", numbers.lr), ("weight_decay", numbers.weight_decay)):
        words += [f"{name}={value / 10:g}..{value * 10:g}:log"] if value else []
    words += ["drop_path=0..0.3"] if freezing(config.freeze).kind not in RESTING else []
    return words + (["label_smoothing=0..0.2"] if config.loss == "cross_entropy" else [])


def search_space(words: Sequence[str], config: TrainConfig) -> Space:
    """What `--search` says. Raises `ValueError` for words that say nothing, and values that the recipe refuses."""
    space: dict[str, Span | Choice] = {}
    for word in words:
        typed, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(
                f"--search takes words such as lr=1e-4..1e-2:log, drop_path=0..0.3 and optimizer=adamw,muon; got {word}"
            )
        name = _setting(typed)
        require(name not in space, "search", f"name {name} once", word)
        space[name] = _span(name, values, config) if ".." in values else _choice(name, values, config)
    return space


def _setting(typed: str) -> str:
    """The setting that a word means. Raises `ValueError` where it is none, or one that all trials share."""
    known = {f.name for f in fields(TrainConfig)}
    plain = typed.lstrip("-").replace("-", "_")
    name = our_word(plain, known, TRAIN_SPELLINGS, "--search")
    if not name:
        close = closest(plain, known - FIXED)
        raise ValueError(
            f"--search names settings of a run; got {typed!r}: " + (f"did you mean {close}?" if close else "see --help")
        )
    if name in FIXED:
        raise ValueError(
            f"--search takes settings that a recipe is made of; got {name}, which all trials share: leave it out"
        )
    return name


def _span(name: str, text: str, config: TrainConfig) -> Span:
    ends, _, scale = text.partition(":")
    low, high = (_taken(name, end, config) for end in ends.split("..", 1))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    right = numbers and low < high and scale in ("", "log") and (scale == "" or low > 0)
    require(right, "search", "have two numbers, the lesser first (above 0 with :log)", f"{name}={text}")
    return Span(low, high, scale == "log")


def _choice(name: str, text: str, config: TrainConfig) -> Choice:
    return Choice(tuple(_taken(name, word, config) for word in text.split(",")))


def _taken(name: str, word: str, config: TrainConfig) -> Any:
    """A value as the recipe has it. Raises `ValueError` as `TrainConfig` does."""
    try:
        return getattr(replace(config, **{name: _value(word)}), name)
    except TypeError as error:
        raise ValueError(f"--search {name}: {error}") from error


def _value(word: str) -> Any:
    """`3`, `3e-4`, `true`, `none`, or a word."""
    plain: dict[str, Any] = {"true": True, "false": False}
    if nothing(word) or word in plain:
        return plain.get(word)
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def _median(epochs: int) -> BasePruner:
    """The first quarter of the epochs, of warm-up mostly, tells little."""
    return _optuna().pruners.MedianPruner(n_startup_trials=FEW, n_warmup_steps=math.ceil(epochs / 4))


def _hyperband(epochs: int) -> BasePruner:
    return _optuna().pruners.HyperbandPruner(min_resource=max(1, epochs // 9), max_resource=epochs)


PRUNERS: Mapping[str, Callable[[int], BasePruner]] = {
    "median": _median, "hyperband": _hyperband, "none": lambda epochs: _optuna().pruners.NopPruner(),
}  # fmt: skip


def _study(config: TrainConfig, space: Space, pruner: str) -> Study:
    """The folder's study, or a new one. Raises `ValueError` for one that was told something else."""
    optuna, out = _optuna(), Path(config.out)
    common = {name: value for name, value in config.changes().items() if name not in FREE}
    told = json.loads(json.dumps({"settings": common, "epochs": config.epochs, "space": space, "pruner": pruner}))
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=_journal(out / "study.log"), study_name="vitrail", load_if_exists=True,
            direction={"max": "maximize", "min": "minimize"}[MODE], pruner=PRUNERS[pruner](config.epochs),
        )  # fmt: skip
    finally:
        optuna.logging.set_verbosity(level)
    was = study.user_attrs.get("told", told)
    if was != told:
        differ = ", ".join(name for name in told if was.get(name) != told[name])
        raise ValueError(
            f"--out must name a search that was told the same; {out} was told another {differ}: name another"
        )
    study.set_user_attr("told", told)
    return study


def _journal(path: Path) -> BaseStorage:
    """Optuna's journal, a line for all that happens, whose last one a crash of the machine may have left unfinished."""
    storages = _optuna().storages
    written = path.read_bytes() if path.is_file() else b""
    if not written.endswith(b"\n"):
        write_whole(path, written[: written.rfind(b"\n") + 1])
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))


def _next(study: Study, config: TrainConfig, trials: int) -> Trial | None:
    """The trial that was stopped, or a new one; None where there are enough."""
    optuna, before = _optuna(), study.get_trials(deepcopy=False)
    stopped = [trial for trial in before if trial.state.name == "RUNNING"]
    number = stopped[0].number if stopped else len(before)
    study.sampler = optuna.samplers.TPESampler(seed=(config.seed + number) % 2**32)
    if stopped:
        return optuna.Trial(study, stopped[0]._trial_id)  # what it was told so far is kept, the rest is drawn
    return study.ask() if number < trials else None


def _try(study: Study, trial: Trial, config: TrainConfig, space: Space, until: float) -> None:
    """A trial from where it stands to its end."""
    optuna, out = _optuna(), folder_of(config, trial.number)
    drawn = {name: _drawn(trial, name, values) for name, values in space.items()}
    told, watch = replace(config, **drawn, out=str(out), max_minutes=0.0), _watch(study, trial, until)
    states = optuna.trial.TrialState
    try:
        begun = has_checkpoints(out / "checkpoints")
        history = resume_training(out, told, watch=watch) if begun else run_training(told, watch=watch)
    except optuna.TrialPruned:
        study.tell(trial, state=states.PRUNED)
    except (NonFiniteLoss, torch.OutOfMemoryError) as error:
        LOG.warning("trial %d failed: %s", trial.number, error)
        study.tell(trial, state=states.FAIL)
    else:
        study.tell(trial, history.best(FIGURE, MODE)[FIGURE])


def folder_of(config: TrainConfig, number: int) -> Path:
    """The run of a trial."""
    return Path(config.out) / f"{number:03}"


def _drawn(trial: Trial, name: str, values: Span | Choice) -> Any:
    if isinstance(values, Choice):
        return trial.suggest_categorical(name, values.values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _watch(study: Study, trial: Trial, until: float) -> Watch:
    """Tells the study each epoch's figure, and ends the trial where it is behind, or the time is up."""

    def watch(history: History) -> None:
        told = study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for row in history.rows:
            if row["epoch"] not in told and math.isfinite(row[FIGURE]):
                trial.report(row[FIGURE], int(row["epoch"]))
        if trial.should_prune():
            raise _optuna().TrialPruned
        if time.monotonic() + history["seconds"][-1] > until:
            raise TimeUp

    return watch


def _found(study: Study, config: TrainConfig) -> Found:
    done = study.get_trials(deepcopy=False)
    rows = tuple(_row(trial, config) for trial in done)
    complete = [row for row in rows if row.state == "complete"]
    differ = len({row.value for row in complete}) > 1
    importance = _optuna().importance.get_param_importances(study) if len(complete) >= FEW and differ else {}
    best = replace(config, **study.best_params, out=TrainConfig.out, max_minutes=0.0) if complete else None
    return Found(rows, importance, best)


def _row(trial: FrozenTrial, config: TrainConfig) -> Row:
    folder = folder_of(config, trial.number)
    history = history_of(folder) if (folder / "history.csv").is_file() else History()
    value = history.best(FIGURE, MODE)[FIGURE] if len(history) else None
    seconds = sum(row["seconds"] for row in history.rows)
    state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    return Row(trial.number, state, value, len(history), seconds, trial.params)


def _keep_best(study: Study, found: Found, out: Path) -> None:
    if found.best:
        best = study.best_trial
        found.best.to_yaml(
            out / "best.yaml",
            header=f"trial {best.number} of {len(found.rows)}, chosen by its {FIGURE}, {best.value:.4f}; no test image "
            "had a say\nvitrail train --config best.yaml --out runs/best",
        )


def markdown(found: Found) -> str:
    """The table of all trials, best first, and what mattered."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.settings))
    head = ["trial", f"{FIGURE.replace('_', ' ')} %", *names, "state", "epochs", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    sign = 1 if MODE == "max" else -1
    order = sorted(
        found.rows, key=lambda r: (r.state != "complete", -sign * (r.value if r.value is not None else -sign))
    )
    for row in order:
        value = "" if row.value is None else f"{100 * row.value:.2f}"
        settings = [_shown(row.settings.get(name, "")) for name in names]
        cells = [str(row.number), value, *settings, row.state, str(row.epochs), f"{row.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if found.importance:
        said = ", ".join(f"{name} {share:.0%}" for name, share in found.importance.items())
        lines += ["", f"What complete trials differ by (PED-ANOVA): {said}."]
    return "\n".join([*lines, "", "Chosen by validation images; no test image had a say."])


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Everything a training run can be told. Field names are the flags, attribute docstrings are the `--help`.

A YAML file holds what differs from the defaults, so that it reads as a recipe; `include: training.yaml` puts it on top
of what that file says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml

from vitrail.data.augment import AugmentConfig
from vitrail.data.datasets import DataConfig
from vitrail.data.sizes import SizeConfig
from vitrail.files import write_whole
from vitrail.names import POOLINGS, TRAIN_SPELLINGS, check_choice, normalise_kwargs, nothing, require, shortened
from vitrail.tasks.distill import DistillConfig
from vitrail.tasks.losses import LossConfig, LossName
from vitrail.train.finetune import FinetuneConfig, freezing
from vitrail.train.optim import OptimConfig

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
StrategyName = Literal["auto", "ddp", "fsdp"]
Log = Literal["csv", "tensorboard", "wandb", "mlflow"]
GlobalPool = Literal["auto", "token", "avg", "map"]
LOG = logging.getLogger("vitrail")
AUTO = "auto"
"""the model that is meant where none is named: `DEFAULT`, or that of the weights to begin with"""
DEFAULT = "vit_tiny"
PAD, RESIZED, RAND, GROWN = "--crop pad", "--crop resized", "--auto-augment rand", "--grow-from"
FALLING, FALLS, RESTARTS = "a --schedule that falls", "--schedule step", "--schedule restarts"
SQUARES = "an --optimizer other than sgd"
BCE, FOCAL, ASYMMETRIC = (f"--loss {name}" for name in ("bce", "focal", "asymmetric"))
EFFECTIVE, TAUGHT, SOFT = "--class-weights effective", "--teacher", "--teacher and --distillation soft"
SEVERAL = "several processes (--devices, --num-nodes)"
FETCHED, KEPT, VALIDATED = "--data cifar10 or cifar100", "a folder to write to (out)", "validation images"
ATTENDING = "a model with attention"
BLOCKS = "layers that are trained (another --freeze)"
RESTING = ("backbone", "prompts", "deep_prompts")
"""where no layer of the network but its head is in training mode"""
NEEDS = {
    "crop_pad": PAD, "pad_mode": PAD, "crop_scale": RESIZED, "rand_ops": RAND, "rand_magnitude": RAND,
    "rand_std": RAND, "rand_chance": RAND,
    "grow_until": GROWN, "drop_path": BLOCKS,
    "min_lr": FALLING, "decay_epochs": FALLS, "decay_steps": FALLS, "decay_rate": FALLS, "restart_epochs": RESTARTS,
    "restart_steps": RESTARTS, "restart_factor": RESTARTS, "beta2": SQUARES,
    "bce_threshold": BCE, "focal_gamma": FOCAL, "asl_gamma_neg": ASYMMETRIC, "asl_gamma_pos": ASYMMETRIC,
    "asl_clip": ASYMMETRIC, "effective_beta": EFFECTIVE, "teacher_path": TAUGHT, "distillation": TAUGHT,
    "distillation_alpha": TAUGHT, "distillation_tau": SOFT,
    "strategy": SEVERAL, "download": FETCHED, "log": KEPT, "checkpoint_every": KEPT, "patience": VALIDATED,
    "entropy_floor": ATTENDING,
}  # fmt: skip
"""settings that do nothing without another, and which"""
KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "none"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig, AugmentConfig, SizeConfig, LossConfig, DistillConfig, OptimConfig, FinetuneConfig):
    """A whole training run: images, augmentation, loss, teacher, optimiser, weights to begin with, model and machine.

    Raises `ValueError` for a value out of its range, `TypeError` for one of another type, each naming the flag.
    """

    model: str = AUTO
    """a row of `vitrail models`, or a short name that the image size completes; auto is vit_tiny, or what the weights
    of --from are for"""
    out: str = "runs/run"
    """folder of the run: config, history, checkpoints, model"""
    global_pool: GlobalPool = "auto"
    """what the head reads: token (the class token), avg (the mean of the image's) or map (attention pooling); auto is
    what the row or the weights have"""
    drop_path: float = 0.0
    """stochastic depth of the last block"""
    drop_rate: float = 0.0
    """dropout before the head"""
    ema: float = 0.0
    """decay of the weights' running average, such as 0.999, which is then validated and kept; 0 turns it off"""
    precision: Precision = "fp32"
    """arithmetic of the network; bf16 and fp16 are mixed precision, fp16 for GPUs only"""
    device: Device = "auto"
    """auto takes the best there is"""
    devices: int = 1
    """processes on this machine, one device each"""
    num_nodes: int = 1
    """machines; start the same command on each with torchrun or SLURM"""
    strategy: StrategyName = "auto"
    """how several processes share the network: ddp, each has all of it; fsdp, each has a share; auto is ddp"""
    entropy_floor: float = 0.02
    """name attention layers whose entropy falls below this share of its most, once an epoch; 0 looks at none"""
    deterministic: bool = False
    """on a GPU, only kernels that repeat themselves bit for bit: slower, and a warning where there is none"""
    log: tuple[Log, ...] = ("csv",)
    """history.csv is always written; tensorboard, wandb and mlflow are told beside it"""
    profile: bool = False
    """measure some forty steps, say what bounds the run, write profile.md into its folder, and go on"""
    checkpoint_every: int = 0
    """keep a checkpoint of every so many epochs; 0 keeps only the last and the best"""
    patience: int = 0
    """stop after so many epochs without a better validation figure; 0 never does"""
    max_minutes: float = 0.0
    """stop before the epoch that would pass this limit; the schedule stays that of all epochs; 0 sets no limit"""
    debug: bool = False
    """a few batches an epoch, to see that everything runs"""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), kinds[f.name]))
        super().__post_init__()  # each part checks its own fields and passes on to the next
        for name in ("drop_path", "drop_rate", "ema", "entropy_floor"):
            require(0 <= getattr(self, name) < 1, name, "lie in [0, 1)", getattr(self, name))
        averages = self.optimizer == "schedule_free"
        require(not (averages and self.ema), "ema", "be 0 with --optimizer schedule_free, which averages", self.ema)
        for name in ("devices", "num_nodes"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("checkpoint_every", "patience"):
            require(getattr(self, name) >= 0, name, "be 0 (off) or more", getattr(self, name))
        require(0 <= self.max_minutes < math.inf, "max_minutes", "be 0 (off) or more", self.max_minutes)
        require(self.model != "", "model", "name a model; see `vitrail models`", "nothing")
        require(self.out != "", "out", "name a folder", "nothing")
        together = freezing(self.freeze).kind != "gradual" or self.world == 1
        require(together, "freeze", "be another with several processes, which share all gradients", self.freeze)
        self._check_words()

    def _check_words(self) -> None:
        object.__setattr__(self, "global_pool", POOLINGS.get(self.global_pool, self.global_pool))
        kinds = {"precision": Precision, "device": Device, "strategy": StrategyName, "global_pool": GlobalPool}
        for name, kind in kinds.items():
            check_choice(_flag(name), getattr(self, name), get_args(kind))
        for word in self.log:
            check_choice("--log", word, get_args(Log))
        refused = self.precision == "fp16" and self.device == "cpu"
        require(not refused, "precision", "be fp32 or bf16 with --device cpu", "fp16")
        scaled = self.precision == "fp16" and self.strategy == "fsdp"
        require(not scaled, "precision", "be fp32 or bf16 with --strategy fsdp", "fp16")

    @property
    def world(self) -> int:
        """Processes of the run, on all machines."""
        return self.devices * self.num_nodes

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from words in any spelling that `vitrail.names` knows (`learning_rate`, `mixup_alpha`, …).

        Raises `TypeError` for an unknown word, naming the nearest, and for a value of the wrong type.
        """
        given = normalise_kwargs(values, {f.name for f in fields(cls)}, TRAIN_SPELLINGS, cls.__name__)
        return cls(**given)

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def to_yaml(self, path: str | Path, header: str = "") -> None:
        """Writes what differs from the defaults, whole or not at all; lines of `header` become comments above it."""
        comment = "".join(f"# {line}\n" for line in header.splitlines())
        write_whole(path, comment + yaml.safe_dump(_plain(self.changes()), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The config in a YAML file, on top of those that its `include` names, later ones over earlier ones.

        Raises `ValueError` naming the file and what is wrong with it, or in it.
        """
        with _naming(path):
            return cls.from_dict(_read_yaml(Path(path), {f.name for f in fields(cls)}))


def _read_yaml(path: Path, known: Collection[str], within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, in our words, with what it includes; `within` are the files that include it."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"a config holds lines such as `epochs: 100`; got {type(values).__name__}")
    own = {str(key).replace("-", "_"): value for key, value in values.items()}
    merged: dict[str, Any] = {}
    for other in _included(path, own.pop("include", []), within):
        with _naming(other):
            merged |= _read_yaml(other, known, (*within, path.resolve()))
    return merged | normalise_kwargs(own, known, TRAIN_SPELLINGS, TrainConfig.__name__)


def _included(path: Path, named: Any, within: Collection[Path]) -> list[Path]:
    """The files that one file includes, beside which they are looked for."""
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"include takes the name of a file beside this one, or a list of them; got {shortened(named)}")
    files = [path.parent / name for name in names]
    for file in files:
        if file.resolve() in (*within, path.resolve()):
            raise ValueError(f"include must not come round to a file that it began with; got {file}: take it out")
    return files


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """What is wrong with a file, or in it, as one `ValueError` that names it."""
    try:
        yield
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"a config is a YAML file that can be read; got {path} ({error.strerror}): name another"
        ) from error


def say_idle(config: TrainConfig, *, kept: bool = True, validated: bool = True, attends: bool = True) -> None:
    """Tells the logger `vitrail`, in one line, which settings do nothing, and what each would need.

    `kept` and `validated` say whether the run has a folder and validation images, `attends` whether its model is one
    with attention.
    """
    schedule = config.numbers().schedule
    there = {
        PAD: config.crop in ("auto", "pad"),
        RESIZED: config.crop in ("auto", "resized"),
        RAND: config.auto_augment == "rand",
        GROWN: config.grow_from is not None,
        FALLING: schedule != "constant",
        FALLS: schedule == "step",
        RESTARTS: schedule == "restarts",
        SQUARES: config.optimizer != "sgd",
        **{f"--loss {name}": config.loss == name for name in get_args(LossName)},
        EFFECTIVE: config.class_weights == "effective",
        TAUGHT: config.teacher != "",
        SOFT: config.teacher != "" and config.distillation == "soft",
        FETCHED: config.data in ("cifar10", "cifar100"),
        SEVERAL: config.world > 1,
        KEPT: kept,
        VALIDATED: validated,
        ATTENDING: attends,
        BLOCKS: freezing(config.freeze).kind not in RESTING,
    }
    idle = [name for name in config.changes() if name in NEEDS and not there[NEEDS[name]]]
    if idle:
        said = "; ".join(f"{_flag(name)} needs {NEEDS[name]}" for name in idle)
        LOG.warning("these settings do nothing here: %s", said)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type. YAML reads `1e-3` as text and `1` as an integer: both will do for a float.

    So will NumPy's numbers, of which searches over settings are made; and `none` where there may be no value.
    """
    if get_origin(kind) is tuple:
        return tuple(_words(name, value))
    words = get_origin(kind) is Literal
    kinds = set(get_args(kind)) if isinstance(kind, UnionType) else {str} if words else {kind}
    if NoneType in kinds and str not in kinds and isinstance(value, str) and nothing(value):
        return None
    if isinstance(value, Real) and value is not True and value is not False:
        value = int(value) if isinstance(value, Integral) else float(value)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    plain = kinds & set(KIND_NAMES)
    if plain and type(value) not in kinds:
        wanted = " or ".join(sorted(KIND_NAMES[k] for k in plain))
        raise TypeError(f"{_flag(name)} takes {wanted}; got {shortened(value)}")
    return tuple(value) if isinstance(value, list) else value


def _words(name: str, value: Any) -> list[str]:
    """Several words, or one, which may be all of them with spaces or commas between."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{_flag(name)} takes words; got {shortened(value)}")
    return list(words)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

"""One command's worth of work: images, model, training, evaluation, report; and `ViTTrainer` for loaders of your own.

TrainConfig ── run_training ──> runs/NAME/  config.yaml  history.csv  checkpoints/  model/  metrics.json  report.html
"""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data.augment import AugmentConfig, BatchAugment
from vitrail.data.datasets import DataConfig, describe, load_splits
from vitrail.data.imagesets import Splits
from vitrail.data.loading import make_loader
from vitrail.data.transforms import eval_transform, train_transform
from vitrail.files import write_whole
from vitrail.folder import find_folder, read_card
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS, resolve_name
from vitrail.models.vit import VisionTransformer, ViTConfig
from vitrail.names import TRAIN_SPELLINGS, normalise_kwargs
from vitrail.records import Batch, History
from vitrail.report import RunFacts, report_run
from vitrail.tasks.base import evaluate, pick_device
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Loader, fit, starting_point
from vitrail.weights.load import SHIPPED, create_model, load_model

DEMO = files("vitrail") / "assets" / "demo.yaml"
SETTLED = {f.name for part in (DataConfig, AugmentConfig) for f in fields(part)} - {"seed"} | {
    "model", "out", "drop_path", "drop_rate",
}  # fmt: skip
"""settings of a run that a model and loaders of one's own have answered"""


def run_training(config: TrainConfig, *, resume: bool = False) -> History:
    """Trains, evaluates and explains as `config` says, and writes its run folder. Returns the epochs' figures.

    With `resume` the folder's last checkpoint is gone on with. Raises `ValueError` as `fit` does, and for a model
    that lacks what `config` asks of it.
    """
    out = Path(config.out)
    starting_point(out, resume)  # before anything is read or written
    splits = load_splits(config)
    model = make_model(config, splits)
    task = Classify(model, config.label_smoothing)
    train = make_loader(
        splits.train, batch_size=config.batch_size, train=True, seed=config.seed, workers=config.workers,
        transform=train_transform(model.preprocess, config),
    )  # fmt: skip
    augment = BatchAugment(config, model.preprocess, len(splits.classes))
    if not resume:
        write_whole(out / "splits.json", json.dumps(splits.record(), indent=1))
    history = fit(
        task, train, eval_loader(splits, "val", model, config), config, augment=augment, out=out, resume=resume
    )
    best = Classify(load_model(out).to(pick_device(config.device)))
    report_run(out, best, eval_loader(splits, "test", model, config), splits, history, _facts(config))
    return history


def resume_training(run: str | Path, config: TrainConfig | None = None) -> History:
    """Goes on with a run folder where its last checkpoint stands, as its config.yaml says, or as `config` does.

    Raises `ValueError` for a folder without config.yaml, and where `config` changes what no resumed run may change.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"a run to be resumed holds config.yaml; there is none in {run}: name a folder made by `train`"
        )
    return run_training(replace(config or TrainConfig.from_yaml(path), out=str(run)), resume=True)


def demo_config(out: str = "runs/demo") -> TrainConfig:
    """The recipe of `vitrail demo`: the shipped blood cells, in about two minutes on two cores."""
    return replace(TrainConfig.from_yaml(Path(str(DEMO))), out=out)


def make_model(config: TrainConfig, splits: Splits) -> Backbone:
    """A model for these images, its weights drawn from the seed. Says what a short name became.

    Raises `ValueError` for an unknown name, and for a dropout that the model does not have.
    """
    preprocess = splits.preprocess(config.img_size)
    row = resolve_name(config.model, min(preprocess.img_size))
    if row != config.model:
        print(f"{config.model} is {row}, for images of {min(preprocess.img_size)} pixels")
    torch.manual_seed(config.seed)
    model = create_model(
        row, img_size=preprocess.img_size, in_chans=preprocess.in_chans, num_classes=len(splits.classes),
        **_dropouts(row, config),
    )  # fmt: skip
    model.preprocess, model.classes, model.images = preprocess, splits.classes, describe(splits)
    return model


def _dropouts(row: str, config: TrainConfig) -> dict[str, Any]:
    """The dropouts that are on, by the names of the model's fields."""
    known = {f.name for f in fields(FAMILIES[ROWS[row]].config)}
    wanted = {"drop_rate": ("--drop-rate", config.drop_rate), "drop_path_rate": ("--drop-path", config.drop_path)}
    for name, (flag, value) in wanted.items():
        if value and name not in known:
            raise ValueError(f"{row} takes no {flag}; got {value}: leave it out")
    return {name: value for name, (_, value) in wanted.items() if value}


def eval_loader(splits: Splits, part: str, model: Backbone, config: DataConfig) -> DataLoader[Batch]:
    """One pass over a part of the data, as the model's preprocessing wants it."""
    images = {"train": splits.train, "val": splits.val, "test": splits.test}[part]
    return make_loader(
        images, batch_size=config.batch_size, train=False, seed=config.seed, workers=config.workers,
        transform=eval_transform(model.preprocess),
    )  # fmt: skip


def evaluate_model(
    name: str | Path, *, data: str, data_dir: str = "data", split: str = "test", batch_size: int = 128,
    device: str = "auto", workers: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """All figures of a trained model on a part of a data set.

    Where the data names no such part, it is drawn as it was for the model's own training, so that no image that the
    model was trained on is among it. Raises `ValueError` where the data has other classes than the model, naming both.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be train, val or test; got {split!r}")
    model = load_model(name).to(pick_device(device))
    config = DataConfig(
        data=data, data_dir=data_dir, batch_size=batch_size, workers=workers, img_size=min(model.preprocess.img_size),
        **_draw_of(name),
    )  # fmt: skip
    splits = load_splits(config)
    task = Classify(model)
    if splits.classes != (model.classes or splits.classes) or len(splits.classes) != task.num_classes:
        raise ValueError(
            f"{name} knows the classes {_some(task.classes)}; {data} has {_some(splits.classes)}: "
            "take data with the model's classes"
        )
    return evaluate(task, eval_loader(splits, split, model, config))


def _draw_of(name: str | Path) -> dict[str, Any]:
    """From what the parts of a model's data were drawn, as far as its card tells."""
    recipe = read_card(SHIPPED[str(name)].folder if name in SHIPPED else find_folder(name)).training.get("recipe", {})
    return {key: recipe[key] for key in ("seed", "val_fraction") if key in recipe}


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (f" … ({len(classes)})" if len(classes) > 5 else "")


class ViTTrainer:
    """Trains a model, or the one that a config describes, on loaders of your own.

    A loader yields `(images, labels)` or a `Batch`: float images are taken as ready, uint8 ones are normalised.
    """

    def __init__(self, model: Backbone | ViTConfig, *, device: str = "auto", out: str | Path | None = None) -> None:
        self.model = VisionTransformer(model) if isinstance(model, ViTConfig) else model
        self.device, self.out = device, out

    def train(self, train_loader: Loader, val_loader: Loader | None = None, **settings: Any) -> History:
        """Trains and returns the epochs' figures; `settings` are fields of `TrainConfig` in any known spelling.

        Raises `TypeError` for an unknown setting, naming the nearest, and for one that the model or the loaders have
        settled; `ValueError` for a bad value.
        """
        names = {f.name for f in fields(TrainConfig)}
        given = normalise_kwargs(settings, names, TRAIN_SPELLINGS, "ViTTrainer.train")
        if settled := sorted(SETTLED & set(given)):
            raise TypeError(
                f"ViTTrainer trains the model on the loaders as they are; got {', '.join(settled)}: "
                "give that to the model, the loaders or ViTTrainer"
            )
        config = TrainConfig.from_dict({"device": self.device, **given})
        out = None if self.out is None else Path(self.out)
        return fit(Classify(self.model, config.label_smoothing), train_loader, val_loader, config, out=out)


def _facts(config: TrainConfig) -> RunFacts:
    flags = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in config.changes().items()]
    return RunFacts(title=f"{config.model} on {config.data}", command=" ".join(["vitrail train", *flags]))

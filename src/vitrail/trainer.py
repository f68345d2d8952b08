"""One command's worth of work: images, model, training, evaluation, report; and `ViTTrainer` for loaders of your own.

TrainConfig ── run_training ──> runs/NAME/  config.yaml  history.csv  checkpoints/  model/  metrics.json  report.html
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch

from vitrail.data.augment import AugmentConfig, BatchAugment, crop_kind
from vitrail.data.badimages import BadImages
from vitrail.data.datasets import DataConfig, load_splits, say_few
from vitrail.data.imagesets import Splits, read_record
from vitrail.data.loading import check_workers
from vitrail.data.sizes import SizeConfig, changing_sizes
from vitrail.data.transforms import train_transform
from vitrail.data.watch import counted_in
from vitrail.evaluation import eval_loader, image_loader, some, splits_again
from vitrail.files import write_whole
from vitrail.models.backbone import Backbone, said_preprocess
from vitrail.models.convnet import ConvNet
from vitrail.models.registry import resolve_name
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig
from vitrail.names import TRAIN_SPELLINGS, normalise_kwargs, shortened
from vitrail.records import Batch, History, Preprocess
from vitrail.report import RunFacts, report_run
from vitrail.tasks.base import pick_device
from vitrail.tasks.classify import Classify, check_names
from vitrail.train.callbacks import Watch
from vitrail.train.changes import WORLD, same_step
from vitrail.train.claim import CLAIM, claimed
from vitrail.train.config import TrainConfig, say_idle
from vitrail.train.engine import fit, refuse_start
from vitrail.train.finetune import prompted
from vitrail.train.loggers import conclude_logs, run_logs
from vitrail.train.machine import DEBUG_BATCHES
from vitrail.train.network import make_model, network_record, row_named
from vitrail.train.resume import Loader, refuse_uneven
from vitrail.train.task import make_task
from vitrail.weights.load import load_model

LOG = logging.getLogger("vitrail")
DEMO = files("vitrail") / "assets" / "demo.yaml"
RUN = (
    "config.yaml", "splits.json", "history.csv", "metrics.json", "report.html", "checkpoints", "model", "tensorboard",
    "wandb", "mlflow", "loggers.json", "bad_images.csv", "images.jsonl",
)  # fmt: skip
"""what a run folder holds"""
SETTLED = {f.name for part in (DataConfig, AugmentConfig, SizeConfig) for f in fields(part)} - {"seed"} | {
    "model", "out", "drop_path", "drop_rate", "global_pool", "from_weights",
}  # fmt: skip
"""settings of a run that a model and loaders of one's own have answered"""
SILENT = "the model is saved without preprocessing, since its images came ready: give ViTTrainer preprocess="
MAKE = "give one that create_model makes, such as create_model('vit_tiny', num_classes=3)"


def run_training(
    config: TrainConfig, *, resume: bool = False, override: Collection[str] = (), watch: Watch | None = None
) -> History:
    """Trains, evaluates and explains as `config` says, and writes its run folder. Returns the epochs' figures.

    With `resume` the folder's last checkpoint is gone on with, and no image that was held out is trained on: parts that
    were drawn stay, new images are trained on if `override` names `images`. The demo's recipe replaces its own former
    run. Raises `ValueError` as `fit` does, for a model that lacks what `config` asks of it, for held-out images that
    are gone, naming them, and for parts of the data that the processes cannot share, or a folder in which another
    process trains. The logger `vitrail` is told of settings that do nothing here. `watch` is `fit`'s; a run that
    somebody watches is one of a study's: no test image is looked at, and there is no report.
    """
    out = Path(config.out)
    check_workers(config.workers)
    run_logs(config, out)  # a package that is missing is said before anything is written
    resolve_name(row_named(config))
    demo = not resume and config == demo_config(config.out)
    if not demo:
        refuse_start(out, resume, override)
    with claimed(out):  # before anything is read or written
        if demo:
            _clear_demo(out)
        refuse_start(out, resume)
        return _run(config, out, resume, override, watch)


def _run(config: TrainConfig, out: Path, resume: bool, override: Collection[str], watch: Watch | None) -> History:
    """The run in a folder that is nobody else's."""
    former = read_record(out / "splits.json") if resume else None
    splits = splits_again(config, former) if former else load_splits(config)
    if former and list(splits.classes) != former["classes"]:
        was, now = some(tuple(former["classes"])), some(splits.classes)
        raise ValueError(f"{config.data} had the classes {was} when training began; now it has {now}: train anew")
    refuse_uneven((splits.val, splits.test), config)
    model = make_model(config, splits, former.get("network") if former else None)
    say_few(splits)
    say_idle(replace(config, crop=crop_kind(config, model.preprocess)), attends=not isinstance(model, ConvNet))
    if former and "preprocess" in former and "preprocess" not in override:  # of the images that training began with
        model.preprocess = Preprocess.from_dict(former["preprocess"]).replace(img_size=model.preprocess.img_size)
    task = make_task(model, config, list(splits.train.counts().values()))
    train = image_loader(splits.train, config, train_transform(model.preprocess, config), train=True)
    val, test = (eval_loader(images, model, config) for images in (splits.val, splits.test))
    batches = min(len(train), DEBUG_BATCHES) if config.debug else len(train)
    sizes = changing_sizes(config, model.preprocess.img_size, model.cell, config.epochs, batches)
    augment = BatchAugment(config, model.preprocess, len(splits.classes), sizes)
    record = splits.record() | {"preprocess": asdict(model.preprocess)} | network_record(config, model)
    if not resume:
        write_whole(out / "splits.json", json.dumps(record, indent=1))
    with counted_in(BadImages(out, resume=resume), train, val, test) as bad:
        history = fit(
            task, train, val, config, augment=augment, out=out, resume=resume, override=override,
            notes={"drawn": splits.digests()}, watch=watch,
        )  # fmt: skip
        with _kept(out):
            if resume:  # only now: a resume that was refused changes nothing
                write_whole(out / "splits.json", json.dumps(record, indent=1))
            if watch:
                return history
            best = Classify(load_model(out).to(pick_device(config.device)))
            figures = report_run(out, best, test, history, facts := _facts(config, splits, model), bad)
            conclude_logs(config, out, facts.split, figures, len(history))
    return history


def resume_training(
    run: str | Path, config: TrainConfig | None = None, *, override: Collection[str] = (),
    allow_world_change: bool = False, watch: Watch | None = None,
) -> History:  # fmt: skip
    """Goes on with a run folder where its last checkpoint stands, as its config.yaml says, or as `config` does.

    With `allow_world_change`, `devices` and `num_nodes` may be others; unless `override` names `accumulate`, that
    then keeps the images of a step as many as they were.
    Raises `ValueError` for a folder without config.yaml, and for what differs and `override` does not name.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"a run to be resumed holds config.yaml; there is none in {run}: name a folder made by `train`"
        )
    former = TrainConfig.from_yaml(path)
    now = replace(config or former, out=str(run))
    if allow_world_change:
        if "accumulate" not in override:
            now = same_step(former, now)
        override = [*override, *WORLD, "accumulate"]
    return run_training(now, resume=True, override=override, watch=watch)


def _clear_demo(out: Path) -> None:
    """Removes a former run of the demo. Raises `ValueError` for a folder that holds anything else."""
    held = sorted(path.name for path in out.iterdir() if path.name not in CLAIM) if out.is_dir() else []
    if not held:
        return
    if not _is_demo(out) or set(held) - set(RUN):
        odd = [name for name in held if name not in RUN] or held
        raise ValueError(
            f"the demo writes to a new folder or over its own last run; {out} holds {', '.join(odd[:3])}: "
            "name another with --out"
        )
    for name in held:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def _is_demo(out: Path) -> bool:
    try:
        return replace(TrainConfig.from_yaml(out / "config.yaml"), out=str(out)) == demo_config(str(out))
    except (OSError, ValueError):
        return False


def demo_config(out: str = "runs/demo") -> TrainConfig:
    """The recipe of `vitrail demo`: the shipped blood cells, in about two minutes on two cores."""
    return replace(TrainConfig.from_yaml(Path(str(DEMO))), out=out)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """For what follows training: an error, or an interruption, then says as a note where the model is."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"training is done, and its model is saved in {out / 'model'}; only what comes after it failed")
        raise


class ViTTrainer:
    """Trains a model, or the one that a config describes, on loaders of your own.

    A loader yields `(images, labels)` or a `Batch`: float images are taken as ready, uint8 ones are normalised.
    `preprocess` says how the ready ones were made so, and `classes` what the logits are called; both go into the
    model's card. Without `preprocess`, a new model trained on ready images refuses to normalise pictures afterwards.
    `out` becomes a run's folder, with checkpoints, the best model and, of held-out images, `report.html`; `data` is
    what that page calls the images. Raises `TypeError` for what is no model of vitrail's, `ValueError` for names that
    are not one a class.
    """

    def __init__(
        self,
        model: Backbone | ViTConfig,
        *,
        preprocess: Preprocess | None = None,
        classes: Sequence[str] = (),
        device: str = "auto",
        out: str | Path | None = None,
        data: str = "loaders of one's own",
    ) -> None:
        if not isinstance(model, Backbone | ViTConfig):
            raise TypeError(f"ViTTrainer takes a model of vitrail's or a ViTConfig; got {shortened(model)}: {MAKE}")
        self.model = VisionTransformer(model) if isinstance(model, ViTConfig) else model
        check_names(classes, self.model.num_classes)
        self.model.classes = tuple(classes) or self.model.classes
        self._told = preprocess is not None or not _as_constructed(self.model)
        self.model.preprocess = said_preprocess(self.model, preprocess)
        self.device, self.out, self.data = device, out, data

    def train(
        self, train_loader: Loader, val_loader: Loader | None = None, test_loader: Loader | None = None, **settings: Any
    ) -> History:
        """Trains and returns the epochs' figures; `settings` are fields of `TrainConfig` in any known spelling.

        `val_loader` chooses the best epoch; the report's figures are of `test_loader`, or else of `val_loader`.
        With `freeze="prompts:8"` or `"deep_prompts:8"`, `model` is from then on another network, which has them.
        Raises `TypeError` for an unknown setting, naming the nearest, and for one that the model or the loaders have
        settled, and for what is no loader; `ValueError` for a bad value.
        """
        for name, loader in (("train", train_loader), ("val", val_loader), ("test", test_loader)):
            if isinstance(loader, str) or not (hasattr(loader, "__iter__") or (loader is None and name != "train")):
                raise TypeError(f"{name}_loader must yield batches; got {shortened(loader)}: give it a DataLoader")
        names = {f.name for f in fields(TrainConfig)}
        given = normalise_kwargs(settings, names, TRAIN_SPELLINGS, "ViTTrainer.train")
        if settled := sorted(SETTLED & set(given)):
            raise TypeError(
                f"ViTTrainer trains the model on the loaders as they are; got {', '.join(settled)}: "
                "give that to the model, the loaders or ViTTrainer"
            )
        config = TrainConfig.from_dict({"device": self.device, **given})
        out = None if self.out is None else Path(self.out)
        say_idle(
            config, kept=out is not None, validated=val_loader is not None, attends=not isinstance(self.model, ConvNet)
        )
        refuse_start(out, resume=False)
        self.model = prompted(self.model, config.freeze, config.seed)
        task = make_task(self.model, config)
        with claimed(out):  # before the record of another run is removed
            refuse_start(out, resume=False)
            with counted_in(BadImages(out), train_loader, val_loader, test_loader) as bad:
                history = fit(task, train_loader, val_loader, config, augment=self._prepare, out=out)
                if out and not self.model.preprocess.known:
                    LOG.warning(SILENT)
                held_out = val_loader if test_loader is None else test_loader
                if out and held_out is not None:
                    facts = self._facts(given, "val" if test_loader is None else "test")
                    with _kept(out):
                        task.to(pick_device(config.device))
                        figures = report_run(out, task, held_out, history, facts, bad)
                        conclude_logs(config, out, facts.split, figures, len(history))
                    task.cpu()
        return history

    def _facts(self, given: Mapping[str, Any], split: Literal["val", "test"]) -> RunFacts:
        words = ", ".join(["…", *(f"{name}={value!r}" for name, value in given.items())])
        title = f"{self.model.variant or self.model.family} on {self.data}"
        return RunFacts(title=title, command=f"ViTTrainer(…).train({words})", data=self.data, split=split)

    def _prepare(self, batch: Batch, number: int, total: int) -> Batch:
        """Raw images normalised. Ready ones tell that the preprocessing of a new model is nobody's."""
        if not self._told and "image" in batch and batch["image"].dtype != torch.uint8:
            self.model.preprocess = self.model.preprocess.replace(known=False)
        return self.model.preprocess.prepare(batch)


def _as_constructed(model: Backbone) -> bool:
    """Whether nobody has said how images are made ready for this model."""
    with torch.device("meta"):
        return model.preprocess == cast(Any, type(model))(model.config).preprocess


def _facts(config: TrainConfig, splits: Splits, model: Backbone) -> RunFacts:
    said = {name: value if isinstance(value, tuple) else (value,) for name, value in config.changes().items()}
    flags = [f"--{name.replace('_', '-')} {shlex.join(map(str, words))}" for name, words in said.items()]
    return RunFacts(
        title=f"{model.variant or model.family} on {config.data}",
        command=" ".join(["vitrail train", *flags]),
        data=splits.name,
        split="val" if splits.test is splits.val else "test",
        counts={part: list(getattr(splits, part).counts().values()) for part in ("train", "val", "test")},
    )

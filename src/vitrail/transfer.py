"""Somebody's weights, fine-tuned on images of one's own, in two lines.

ViTTransferLearning(pretrained_model="vit_base_patch16_224", num_classes=10, freeze_backbone=True)
    .fine_tune(dataset="photos", epochs=20, learning_rate=1e-4)

folder, data set, loader ── loaders ──> fit, as `--freeze` says ──> History; .model .predict(…) .save(…)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.data.augment import BatchAugment
from vitrail.data.datasets import load_splits, say_few
from vitrail.data.imagesets import ImageSet
from vitrail.data.loading import make_loader
from vitrail.data.pairs import Pairs, classes_of
from vitrail.data.transforms import eval_transform, train_transform
from vitrail.images import AnyImage
from vitrail.models.backbone import Backbone
from vitrail.names import TRAIN_SPELLINGS, normalise_kwargs, shortened
from vitrail.predict import ViTClassifier
from vitrail.records import Classification, History
from vitrail.tasks.base import pick_device
from vitrail.tasks.classify import class_names
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.finetune import prompted
from vitrail.train.network import fit_head
from vitrail.train.resume import Loader
from vitrail.train.task import make_task
from vitrail.weights.fit import Rest
from vitrail.weights.load import open_weights

SETTLED = {"data", "img_size", "model", "from_weights", "drop_path", "drop_rate", "global_pool"}
"""settings of a run that the weights and the data set have answered"""
Images = str | Path | Dataset[Any] | Loader


class ViTTransferLearning:
    """A network that begins with somebody's weights, and learns `num_classes` classes of yours.

    `pretrained_model` is what `vitrail train --from` takes, or a network. `freeze_backbone` trains the head alone; any
    other word of `--freeze` goes to `fine_tune`. `img_size` is that of the weights where it is not given; `bands` and
    `rest` say where kernels go for other channels, as `create_model` does. Raises `FetchError` where published weights
    cannot be had, such as without a network, and as `open_weights` does.
    """

    def __init__(
        self,
        pretrained_model: str | Path | Backbone,
        num_classes: int,
        freeze_backbone: bool = False,
        *,
        img_size: int | None = None,
        bands: Sequence[str] | None = None,
        rest: Rest = "mean",
        device: str = "auto",
    ) -> None:
        given: dict[str, Any] = {} if img_size is None else {"img_size": (img_size, img_size)}
        given |= {} if bands is None else {"in_chans": len(bands)}
        own = isinstance(pretrained_model, Backbone)
        self.source = "the given network" if own else str(pretrained_model)
        self.model = (
            pretrained_model if isinstance(pretrained_model, Backbone)
            else open_weights(self.source, bands=bands, rest=rest, **given).train()
        )  # fmt: skip
        self.num_classes, self.freeze_backbone, self.device = num_classes, freeze_backbone, device
        self._fresh = self.model.num_classes != num_classes
        if self._fresh:
            self.model.reset_classifier(num_classes)

    def fine_tune(
        self,
        dataset: Images,
        epochs: int = 20,
        learning_rate: float = 1e-4,
        *,
        val_dataset: Images | None = None,
        batch_size: int = 32,
        freeze: str | None = None,
        out: str | Path | None = None,
        **settings: Any,
    ) -> History:
        """Trains and returns the epochs' figures; `settings` are fields of `TrainConfig` in any known spelling.

        `dataset` is a folder with one sub-folder a class, a name of `--data`, a PyTorch data set of (image, label), or
        a loader. Of a folder or a name, held-out images are its own or drawn; of others they are `val_dataset`, or
        none. Pictures and uint8 tensors of a data set are cut, varied and normalised as the weights want; float tensors
        are taken as ready. A head for other classes than the data's becomes a fresh one; called again, training goes
        on with what was learnt. With `out` the folder gets checkpoints and the best model, which the network is then.

        Raises `ValueError` where the data has other many classes than `num_classes`, `TypeError` for what is none of
        those, and for a setting that the weights or the data have settled.
        """
        config = self._config(settings, epochs, learning_rate, batch_size, freeze)
        train, val = self._parts(dataset, config)
        if val_dataset is not None:
            val = self._part(val_dataset, config)
        self._begin(train)
        self.model = prompted(self.model, config.freeze, config.seed)
        augment = BatchAugment(config, self.model.preprocess, self.num_classes)
        task = make_task(self.model, config)
        loaders = self._loader(train, config, train=True), None if val is None else self._loader(val, config)
        history = fit(task, *loaders, config, augment=augment, out=out)
        task.cpu()
        return history

    def predict(self, image: AnyImage, top: int = 5) -> Classification:
        """The answer to one image: a path, a picture, a tensor or an array."""
        return ViTClassifier(self.model, device=pick_device(self.device).type).predict(image, top)

    def save(self, path: str | Path) -> Path:
        """Writes a model folder, which `load_model` and `ViTClassifier.from_pretrained` open."""
        return self.model.save_pretrained(path)

    def _config(
        self, settings: dict[str, Any], epochs: int, learning_rate: float, batch_size: int, freeze: str | None
    ) -> TrainConfig:
        given = normalise_kwargs(settings, {f.name for f in fields(TrainConfig)}, TRAIN_SPELLINGS, "fine_tune")
        if settled := sorted(SETTLED & set(given)):
            raise TypeError(
                f"fine_tune trains the weights on the data as both are; got {', '.join(settled)}: give that to "
                "ViTTransferLearning, or a network with it"
            )
        frozen = freeze or ("backbone" if self.freeze_backbone else "none")
        own = {"epochs": epochs, "lr": learning_rate, "batch_size": batch_size, "freeze": frozen}
        return TrainConfig.from_dict({"device": self.device, **given, **own})

    def _parts(self, dataset: Images, config: TrainConfig) -> tuple[ImageSet | Loader, ImageSet | Loader | None]:
        if not isinstance(dataset, str | Path):
            return self._part(dataset, config), None
        name = f"folder:{dataset}" if Path(dataset).is_dir() else str(dataset)
        splits = load_splits(TrainConfig(**{**config.changes(), "data": name}))
        self._check(splits.classes, name)
        say_few(splits)
        return splits.train, splits.val

    def _part(self, dataset: Images, config: TrainConfig) -> ImageSet | Loader:
        """Images of a data set, or a loader of ready ones."""
        if isinstance(dataset, str | Path):
            return self._parts(dataset, config)[0]
        if isinstance(dataset, Dataset):
            self._check(classes_of(dataset), type(dataset).__name__)
            ready = isinstance(image := dataset[0][0], Tensor) and image.is_floating_point()
            order = torch.Generator().manual_seed(config.seed)
            return (
                DataLoader(dataset, config.batch_size, shuffle=True, generator=order) if ready else self._own(dataset)
            )
        if not isinstance(dataset, Iterable):
            raise TypeError(
                f"fine_tune takes a folder, a data set of (image, label) or a loader; got {shortened(dataset)}: "
                "torch.utils.data.TensorDataset(images, labels) makes one of tensors"
            )
        if isinstance(dataset, DataLoader):
            self._check(classes_of(dataset.dataset), type(dataset.dataset).__name__)
        return dataset

    def _own(self, dataset: Dataset[Any]) -> Pairs:
        images = Pairs(dataset, classes_of(dataset) or self._unnamed)
        if (most := int(images.labels.max())) >= self.num_classes:
            raise ValueError(
                f"labels must lie in 0 … {self.num_classes - 1}, for num_classes={self.num_classes}; "
                f"{type(dataset).__name__} has {most}: make ViTTransferLearning for more"
            )
        return images

    @property
    def _unnamed(self) -> tuple[str, ...]:
        return class_names((), self.num_classes)

    def _check(self, classes: Sequence[str], data: str) -> None:
        if classes and len(classes) != self.num_classes:
            some = ", ".join(classes[:3]) + (" …" if len(classes) > 3 else "")
            raise ValueError(
                f"ViTTransferLearning was made for num_classes={self.num_classes}; {data} has {len(classes)} classes "
                f"({some}): make it with num_classes={len(classes)}"
            )

    def _begin(self, train: ImageSet | Loader) -> None:
        """The head, and the names of its classes, are those of the data."""
        known = train.classes if isinstance(train, ImageSet) else ()
        if isinstance(train, DataLoader):
            known = classes_of(train.dataset)
        classes = known or self._unnamed
        if not self._fresh:
            fit_head(self.model, classes, self.source)
        self._fresh, self.model.classes = False, classes

    def _loader(self, images: ImageSet | Loader, config: TrainConfig, train: bool = False) -> Loader:
        if not isinstance(images, ImageSet):
            return images
        p = self.model.preprocess
        return make_loader(
            images, batch_size=config.batch_size, train=train, seed=config.seed, workers=config.workers,
            timeout=config.worker_timeout, on_bad_image=config.on_bad_image,
            transform=train_transform(p, config) if train else eval_transform(p),
        )  # fmt: skip

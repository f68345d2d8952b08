"""How well a trained model does on a part of a data set, of which nothing was trained on.

model, data ── the parts as they were drawn for its training ── loader ──> evaluate_model ──> figures
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.data.badimages import BadImages, OnBadImage
from vitrail.data.datasets import DataConfig, DataError, load_splits, same_data
from vitrail.data.imagesets import ImageSet, Splits, read_record
from vitrail.data.loading import make_loader
from vitrail.data.transforms import Transform, eval_transform
from vitrail.data.watch import WatchedLoader, counted_in
from vitrail.folder import find_folder, read_card
from vitrail.models.backbone import Backbone
from vitrail.names import check_choice
from vitrail.tasks.base import evaluate, pick_device
from vitrail.tasks.classify import Classify
from vitrail.weights.load import SHIPPED, load_model

LOG = logging.getLogger("vitrail")


def eval_loader(images: ImageSet, model: Backbone, config: DataConfig) -> WatchedLoader:
    """One pass over images, as the model's preprocessing wants them."""
    return image_loader(images, config, eval_transform(model.preprocess), train=False)


def image_loader(images: ImageSet, config: DataConfig, transform: Transform, *, train: bool) -> WatchedLoader:
    return make_loader(
        images, batch_size=config.batch_size, train=train, seed=config.seed, workers=config.workers,
        timeout=config.worker_timeout, on_bad_image=config.on_bad_image, transform=transform,
        repeats=config.repeats if train else 1,
    )  # fmt: skip


class Measured(dict[str, Tensor]):
    """The figures of a model by their names, and of which images they are."""

    def __init__(self, figures: Mapping[str, Tensor], splits: Splits, split: str, bad_images: int) -> None:
        super().__init__(figures)
        self.classes = splits.classes
        self.split = "val" if split == "test" and splits.test is splits.val else split
        self.drawn = split in splits.drawn or (split == "train" and bool(splits.drawn))
        """whether the part was drawn, because the data does not name it"""
        self.bad_images = bad_images
        """images of the part that were left out"""
        self.images = sum(map(len, splits.part(split))) - bad_images
        self.total = sum(map(len, splits.part("all")))
        """images of the whole data set"""


def evaluate_model(
    name: str | Path, *, data: str, data_dir: str = "data", split: str | None = None, batch_size: int = 128,
    device: str = "auto", workers: int = 0, on_bad_image: OnBadImage = "raise",
) -> Measured:  # fmt: skip
    """All figures of a trained model on a part of a data set, `train`, `val` or `test`, or on `all` of it.

    Where the data names no such part, it is drawn as it was for the model's own training, so that no image that the
    model was trained on is among it. Without `split` it is `test`, or `all` of data that names no parts and is not what
    the model was trained on. With `on_bad_image="skip"`, images that cannot be read are left out and counted.
    Raises `ValueError` where the data has other classes than the model, naming both, and what the loader raises.
    """
    if split is not None:
        check_choice("--split", split, ("train", "val", "test", "all"))
    model = load_model(name).to(pick_device(device))
    config = DataConfig(
        data=data, data_dir=data_dir, batch_size=batch_size, workers=workers, img_size=min(model.preprocess.img_size),
        on_bad_image=on_bad_image,
    )  # fmt: skip
    splits, own = _splits_as_trained(name, config)
    split = split or ("test" if own or "test" not in splits.drawn else "all")
    task = Classify(model)
    if splits.classes != (model.classes or splits.classes) or len(splits.classes) != task.num_classes:
        raise ValueError(
            f"{name} knows the classes {some(task.classes)}; {data} has {some(splits.classes)}: "
            "take data with the model's classes"
        )
    loaders = [eval_loader(images, model, config) for images in splits.part(split)]
    with counted_in(BadImages(), *loaders) as bad:
        return Measured(evaluate(task, chain.from_iterable(loaders)), splits, split, len(bad))


def _splits_as_trained(name: str | Path, config: DataConfig) -> tuple[Splits, bool]:
    """The parts of the data as they were drawn when the model was trained on them, and whether it was, by all that is
    known: by the name of the data, or by the images' own. Those of other data are drawn anew.

    They stand in the run's splits.json; a model folder alone knows seed and share, and a sum to tell by whether the
    draw is the same. Raises `ValueError` where it is not: images that were trained on would be among those held out.
    """
    folder = SHIPPED[str(name)].folder if name in SHIPPED else find_folder(name)
    training = read_card(folder).training
    recipe, digests = training.get("recipe", {}), training.get("drawn", {})
    config = replace(config, **{key: recipe[key] for key in ("seed", "val_fraction") if key in recipe})
    own = same_data(recipe.get("data", DataConfig.data), config.data)
    if (folder.parent / "splits.json").is_file():
        try:
            return splits_again(config, read_record(folder.parent / "splits.json")), True
        except DataError:
            if own:
                raise
    splits = load_splits(config)
    same = splits.digests() == digests
    if own and digests and not same:
        raise ValueError(
            f"{config.data} is not what it was when {name} was trained on it, so what was held out is unknown: "
            "evaluate the run folder, whose splits.json says it"
        )
    return splits, own or (same and bool(digests))


def some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (f" … ({len(classes)})" if len(classes) > 5 else "")


def splits_again(config: DataConfig, former: dict[str, Any]) -> Splits:
    """The parts as `former` records them; images that came later are for training, which is said."""
    splits = load_splits(config, former["drawn"])
    more = len(splits.train) - sum(former["counts"]["train"].values())
    if more and splits.drawn:
        LOG.warning("%s has %+d images since its parts were drawn; new ones are for training", config.data, more)
    return splits

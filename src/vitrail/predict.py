"""From a picture to an answer in words: the network, the preprocessing it was trained with, and its class names.

    path, picture, tensor, array ── cut, normalise ──> batches ── network ──> logits ── softmax ──> Classification

Legend: `B` batch, `C` channels, `H`, `W` pixels of a picture, `h`, `w` pixels that the network takes, `K` classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self, get_args, overload

import torch
from torch import Tensor, nn

from vitrail.data.badimages import OnBadImage
from vitrail.data.transforms import eval_transform
from vitrail.images import AnyImage, ImageError, to_pixels
from vitrail.layers.modes import evaluating
from vitrail.models.backbone import Backbone, said_preprocess
from vitrail.names import check_choice, shortened
from vitrail.records import Classification, Preprocess
from vitrail.tasks.base import pick_device
from vitrail.tasks.classify import answers, check_names, class_names
from vitrail.weights.load import load_model

LOG = logging.getLogger("vitrail")


class Predictor:
    """A network that answers for pictures. `predict` leaves its mode and its gradients as they were.

    `model` maps (B, C, h, w) to logits (B, K). A vitrail model brings `preprocess` and `classes`; any other network
    needs `preprocess`. The model is moved to `device`; None leaves it where it is. Raises `ValueError` without
    `preprocess`, for class names that are not one a logit, and for a device that is not here. A backbone without a head
    may be looked into, but gives no answers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocess: Preprocess | None = None,
        classes: Sequence[str] = (),
        device: str | None = None,
    ) -> None:
        if isinstance(model, Backbone):
            preprocess, classes = said_preprocess(model, preprocess), classes or model.classes
            check_names(classes, model.num_classes)
        if preprocess is None:
            raise ValueError(
                f"a network that is not vitrail's needs its preprocess; got {type(model).__name__} alone: "
                "add preprocess=Preprocess(img_size=…, mean=…, std=…)"
            )
        self.model = model if device is None else model.to(pick_device(device))
        self.preprocess, self.classes = preprocess, tuple(classes)
        self._fit = eval_transform(preprocess)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | None = "auto") -> Self:
        """The predictor of a model folder, a run folder, or a model that ships with vitrail."""
        return cls(load_model(name_or_path), device=device)

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: AnyImage, top: int = 5, batch_size: int = 32, on_bad_image: OnBadImage = "raise"
    ) -> Classification: ...
    @overload
    def predict(
        self, images: Sequence[AnyImage], top: int = 5, batch_size: int = 32, on_bad_image: OnBadImage = "raise"
    ) -> list[Classification]: ...
    def predict(
        self,
        images: AnyImage | Sequence[AnyImage],
        top: int = 5,
        batch_size: int = 32,
        on_bad_image: OnBadImage = "raise",
    ) -> Classification | list[Classification]:
        """The answer to one image, or a list of answers to a list of them; the `id` of an answer is its image's path.

        A tensor or an array holds uint8, or floats in [0, 1] that are not normalised (`vitrail.images.to_pixels`).
        `top` classes are listed. Raises `ValueError` for an image of a wrong type, shape or range, and `ImageError`
        (one too) naming the file that cannot be read. With `on_bad_image="skip"` a list's files that cannot be read
        have no answer, which the ids tell, and the logger `vitrail` is told of each; one image alone, and one without a
        path, still raises.
        """
        check_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        if isinstance(images, list | tuple):
            return list(self.stream(images, top, batch_size, on_bad_image))
        return next(self.stream([images], top, batch_size))  # type: ignore[list-item]

    def stream(
        self, images: Sequence[AnyImage], top: int = 5, batch_size: int = 32, on_bad_image: OnBadImage = "raise"
    ) -> Iterator[Classification]:
        """The answers of `predict`, one after the other, as soon as their batch is done."""
        _check_count("top", top)
        _check_count("batch_size", batch_size)
        check_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        for start in range(0, len(images), batch_size):
            yield from self._answers(images[start : start + batch_size], top, on_bad_image == "skip")

    def look(self, image: AnyImage) -> tuple[Tensor, Tensor]:
        """The picture as it is cut for the network, uint8 (C, h, w), and what the network takes, (1, C, h, w)."""
        picture = self._fit(self._pixels(image))
        return picture, self.preprocess.normalise(picture[None].to(self._device()))

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, h, w) as `look` gives it -> logits (B, K), in evaluation mode without gradients."""
        with evaluating(self.model):
            return self.model(images)

    def answer(self, logits: Tensor, ids: Sequence[str] | None = None, top: int = 5) -> list[Classification]:
        """logits (B, K) in words; classes without names are `class 0`, `class 1`, …

        Raises `ValueError` where the names are not one a logit, and for a backbone without a head, which has none.
        """
        _check_head(self.model)
        check_names(self.classes, logits.shape[-1])
        return answers(logits, class_names(self.classes, logits.shape[-1]), ids, top)

    def _answers(self, images: Sequence[AnyImage], top: int, skip: bool) -> list[Classification]:
        read = [(image, picture) for image in images if (picture := self._picture(image, skip)) is not None]
        if not read:
            return []
        ids = [str(image) if isinstance(image, str | Path) else "" for image, _ in read]
        pictures = torch.stack([picture for _, picture in read])
        return self.answer(self.logits(self.preprocess.normalise(pictures.to(self._device()))), ids, top)

    def _picture(self, image: AnyImage, skip: bool) -> Tensor | None:
        """uint8 (C, h, w); None for a file to be skipped."""
        try:
            return self._fit(self._pixels(image))
        except ImageError as error:
            if not skip or not isinstance(image, str | Path):
                raise
            LOG.warning("no answer: %s", error)
            return None

    def _pixels(self, image: AnyImage) -> Tensor:
        """uint8 (C, H, W) on the CPU, with the channels that the network takes."""
        pixels = to_pixels(image)
        if len(pixels) != self.preprocess.in_chans:
            raise ValueError(
                f"the model takes {self.preprocess.in_chans} channels; got an image of shape {tuple(pixels.shape)}, "
                "channels first: convert it"
            )
        return pixels

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


class ViTClassifier(Predictor):
    """`ViTClassifier.from_pretrained("path or name").predict("photo.jpg")["class"]`: a vitrail model that classifies.

    Raises `ValueError` for a model without a head.
    """

    model: Backbone

    def __init__(self, model: Backbone, *, device: str | None = None) -> None:
        _check_head(model)
        super().__init__(model, device=device)


def _check_count(name: str, count: Any) -> None:
    if count is True or count is False or not isinstance(count, Integral):
        raise TypeError(f"{name} takes a whole number; got {shortened(count)}")
    if int(count) < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")


def _check_head(model: nn.Module) -> None:
    """Without one, features would be taken for logits."""
    if isinstance(model, Backbone) and model.num_classes < 1:
        raise ValueError(
            "a classifier needs num_classes of at least 1; got 0: call reset_classifier(num_classes) and train it; "
            "`vitrail explain` and AttentionVisualizer look into a network without a head too"
        )

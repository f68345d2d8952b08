"""From a picture to an answer in words: the network, the preprocessing it was trained with, and its class names.

    path, Pillow picture, uint8 array ── cut, normalise ──> batches ── network ──> logits ── softmax ──> Classification

Legend: `B` batch, `C` channels, `H`, `W` pixels of a picture, `h`, `w` pixels that the network takes, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.data.transforms import eval_transform
from vitrail.images import read_image, to_tensor
from vitrail.models.backbone import Backbone
from vitrail.records import Classification, Preprocess
from vitrail.tasks.base import evaluating, pick_device
from vitrail.tasks.classify import answers, class_names
from vitrail.weights.load import load_model

AnyImage = str | Path | Image.Image | Tensor | np.ndarray[Any, Any]
"""a path, a Pillow picture, a uint8 tensor (C, H, W), or a uint8 array (H, W, C) or (H, W)"""


class Predictor:
    """A network that answers for pictures. `predict` leaves its mode and its gradients as they were.

    `model` maps (B, C, h, w) to logits (B, K). A vitrail model brings `preprocess` and `classes`; any other network
    needs `preprocess`. The model is moved to `device`; None leaves it where it is. Raises `ValueError` without
    `preprocess`, and for a device that is not here.
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
            preprocess, classes = preprocess or model.preprocess, classes or model.classes
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
    def predict(self, images: AnyImage, top: int = 5, batch_size: int = 32) -> Classification: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[AnyImage], top: int = 5, batch_size: int = 32) -> list[Classification]: ...
    def predict(
        self, images: AnyImage | Sequence[AnyImage], top: int = 5, batch_size: int = 32
    ) -> Classification | list[Classification]:
        """The answer to one image, or a list of answers to a list of them; the `id` of an answer is its image's path.

        `top` classes are listed. Raises `ValueError` for an image of a wrong type or shape, and `ImageError` (one too)
        naming the file that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not isinstance(images, list | tuple):
            return self._answers([images], top)[0]  # type: ignore[list-item]
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return [answer for part in parts for answer in self._answers(part, top)]

    def look(self, image: AnyImage) -> tuple[Tensor, Tensor]:
        """The picture as it is cut for the network, uint8 (C, h, w), and what the network takes, (1, C, h, w)."""
        picture = self._fit(self._pixels(image))
        return picture, self.preprocess.normalise(picture[None].to(self._device()))

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, h, w) as `look` gives it -> logits (B, K), in evaluation mode without gradients."""
        with evaluating(self.model):
            return self.model(images)

    def answer(self, logits: Tensor, ids: Sequence[str] | None = None, top: int = 5) -> list[Classification]:
        """logits (B, K) in words; classes without names are `class 0`, `class 1`, …"""
        return answers(logits, class_names(self.classes, logits.shape[-1]), ids, top)

    def _answers(self, images: Sequence[AnyImage], top: int) -> list[Classification]:
        pictures = torch.stack([self._fit(self._pixels(image)) for image in images])
        ids = [str(image) if isinstance(image, str | Path) else "" for image in images]
        return self.answer(self.logits(self.preprocess.normalise(pictures.to(self._device()))), ids, top)

    def _pixels(self, image: AnyImage) -> Tensor:
        """uint8 (C, H, W) on the CPU, with the channels that the network takes."""
        pixels = _to_pixels(image)
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
        if model.config.num_classes < 1:
            raise ValueError("a classifier needs num_classes of at least 1; got 0: call reset_classifier(num_classes)")
        super().__init__(model, device=device)


def _to_pixels(image: AnyImage) -> Tensor:
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, Tensor):
        raise ValueError(
            f"an image is a path, a Pillow picture, or a uint8 tensor or array; got {type(image).__name__}: convert it"
        )
    if image.dtype != torch.uint8 or image.ndim != 3 or not image.numel():
        mend = "give list(batch)" if image.ndim == 4 else "scale it to 0 … 255 and convert it"
        raise ValueError(f"an image as a tensor is uint8 (C, H, W); got {image.dtype} {tuple(image.shape)}: {mend}")
    return image.cpu()


def _from_array(image: np.ndarray[Any, Any]) -> Tensor:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        mend = "give list(batch)" if image.ndim == 4 else "scale it to 0 … 255 and convert it"
        raise ValueError(f"an image as an array is uint8 (H, W, C) or (H, W); got {image.dtype} {image.shape}: {mend}")
    return to_tensor(Image.fromarray(image)) if image.ndim == 2 else torch.from_numpy(image.copy()).permute(2, 0, 1)

"""Augmentation of whole batches on their device: crop, flip, colours, policies, erasing, then mixing of images.

    uint8 (B, C, H, W) ─ crop ─ flip ─ colours ─ policy ─ erase ─ resize ─ normalise ─ mixup or cutmix ─> float, (B, K)

Every draw comes from torch's global CPU generator, so a batch is a function of the seed set before it, on any device.
(Only the noise that fills erased rectangles is drawn on the device.) Float images are ready: they are only mixed.

Legend: `B` images or clips, `T` frames of a clip, `C` channels, `H`, `W` pixels, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.operations import brightness, colour, contrast
from vitrail.data.policies import BINS, POLICIES, Drawn, apply_operations, draw_rand
from vitrail.data.sizes import Sizes, resized
from vitrail.names import check_choice, require
from vitrail.records import UNLABELLED, Batch, Preprocess

Crop = Literal["auto", "pad", "resized", "none"]
AutoAugment = Literal["none", "auto", "cifar10", "imagenet", "rand", "trivial"]
PadMode = Literal["zero", "reflect"]
SMALL_SIDE = 96
"""up to this side an image is small: it is padded and cropped, gets CIFAR-10's policy, and may be held in memory"""
TIED = ("boxes", "mask", "pad_mask")
"""keys that belong to places in an image"""
ALPHA = (1e-3, 1e3)
"""beyond these a Beta distribution in single precision is none"""
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied. Probabilities are per image."""

    flip: float = 0.5
    """probability of a mirror image, left and right swapped"""
    flip_vertical: float = 0.0
    """probability of top and bottom swapped: for images without an up, such as cells"""
    crop: Crop = "auto"
    """pad: pad and cut at a random place; resized: a random part, enlarged; auto: pad up to 96 pixels, else resized"""
    crop_pad: float = 0.125
    """crop pad: width of the padding as a share of the image (4 of 32 pixels)"""
    pad_mode: PadMode = "zero"
    """crop pad: what the padding holds, black or the image reflected"""
    crop_scale: float = 0.08
    """crop resized: smallest part of the image's area"""
    color_jitter: float = 0.0
    """largest change of brightness, contrast and saturation, as a share"""
    auto_augment: AutoAugment = "none"
    """AutoAugment (auto takes the policy that fits the size; cifar10, imagenet name one), rand or trivial"""
    rand_ops: int = 2
    """RandAugment: operations an image"""
    rand_magnitude: int = 9
    """RandAugment: strength, 0 to 30; three times timm's, which ends at 10"""
    rand_std: float = 0.0
    """RandAugment: standard deviation of the strength, drawn for each operation and kept in 0 to 30; timm's mstd 0.5 is
    1.5 here"""
    rand_chance: float = 1.0
    """RandAugment: probability of each operation; timm's is 0.5"""
    mixup: float = 0.0
    """alpha of mixup's Beta(alpha, alpha); 0 is off. With cutmix on too, each batch gets one of the two"""
    cutmix: float = 0.0
    """alpha of cutmix's Beta(alpha, alpha); 0 is off"""
    erase: float = 0.0
    """probability of a rectangle of noise over the image"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        for name in ("flip", "flip_vertical", "erase", "color_jitter", "crop_pad"):
            require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]", getattr(self, name))
        check_choice("--crop", self.crop, get_args(Crop))
        check_choice("--pad-mode", self.pad_mode, get_args(PadMode))
        check_choice("--auto-augment", self.auto_augment, get_args(AutoAugment))
        require(0 < self.crop_scale <= 1, "crop_scale", "lie in (0, 1]", self.crop_scale)
        require(self.rand_ops >= 1, "rand_ops", "be at least 1", self.rand_ops)
        require(0 <= self.rand_magnitude <= BINS, "rand_magnitude", f"lie in 0 to {BINS}", self.rand_magnitude)
        require(0 <= self.rand_std <= BINS, "rand_std", f"lie in 0 (all of one strength) to {BINS}", self.rand_std)
        require(0 < self.rand_chance <= 1, "rand_chance", "lie in (0, 1]", self.rand_chance)
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            require(alpha == 0 or ALPHA[0] <= alpha <= ALPHA[1], name, "be 0 (off) or lie in [0.001, 1000]", alpha)


def crop_kind(config: AugmentConfig, preprocess: Preprocess) -> Crop:
    """`pad`, `resized` or `none`: what `auto` stands for at the model's image size."""
    if config.crop != "auto":
        return config.crop
    return "pad" if max(preprocess.img_size) <= SMALL_SIDE else "resized"


class BatchAugment:
    """`augment(batch, number, total) -> batch`: raw images varied and normalised, ready ones mixed, views as they are.

    Labels stay (B,) int64 without mixing and are (B, num_classes) float with it; all other keys travel along.
    `resized` crops are not made here but image by image in `train_transform`, where the whole picture still is.
    Of frames (B, T, C, H, W) a clip is varied as one image is: every draw holds for all its frames.
    With `sizes`, raw images of batch `number` of `total` are then resized as that says.
    Raises `ValueError` where images would move, or be mixed, that have boxes, masks or targets of their cells, naming
    the key; for images of other dimensions; where views would not be varied, naming the flags; and, while mixing, for
    labels that are no classes of the model.
    """

    def __init__(
        self, config: AugmentConfig, preprocess: Preprocess, num_classes: int, sizes: Sizes | None = None
    ) -> None:
        self.config, self.preprocess, self.num_classes = config, preprocess, num_classes
        self.sizes = sizes
        pads = crop_kind(config, preprocess) == "pad"
        self.pad = [round(config.crop_pad * side) if pads else 0 for side in preprocess.img_size]
        self.policy = _policy(config, preprocess)

    def __call__(self, batch: Batch, number: int = 0, total: int = 1) -> Batch:
        changed = dict(batch)
        self._check_views(batch.get("views", []))
        if "image" in batch:
            self._check(batch)
            raw = batch["image"].dtype == torch.uint8
            size = self.sizes(number, total) if self.sizes else batch["image"].shape[-2:]
            images = self._ready(batch["image"], size) if raw else batch["image"]
            changed["image"] = images
            if self.config.mixup or self.config.cutmix:
                changed["image"], changed["label"] = self._mix(images, self._labels(batch))
        return self.preprocess.prepare(Batch(**changed))  # type: ignore[typeddict-item]

    def _check(self, batch: Batch) -> None:
        if batch["image"].ndim not in (4, 5):
            shape = tuple(batch["image"].shape)
            raise ValueError(f"images to be augmented are (B, C, H, W), or frames (B, T, C, H, W); got {shape}")
        tied = [key for key in TIED if key in batch]
        tied += [f"target.{name}" for name, value in batch.get("target", {}).items() if value.ndim > 1]
        flags = self._moving(batch["image"].dtype == torch.uint8)
        if tied and flags:
            raise ValueError(
                f"{', '.join(flags)} would move images but not their {tied[0]}: "
                "switch off what is named, with 0 or none"
            )

    def _check_views(self, views: Sequence[Tensor]) -> None:
        raw = any(view.dtype == torch.uint8 for view in views)
        colours = {"--color-jitter": self.config.color_jitter, "--erase": self.config.erase}
        flags = self._moving(raw) + [flag for flag, strength in colours.items() if raw and strength]
        if views and flags:
            raise ValueError(
                f"views are taken as they are; {', '.join(flags)} would not vary them: switch off what is named, "
                "with 0 or none, and vary them in the loader"
            )

    def _moving(self, raw: bool) -> list[str]:
        """The flags that are on and move pixels; ready images are mixed at most."""
        config = self.config
        spatial = {
            "--flip": config.flip > 0, "--flip-vertical": config.flip_vertical > 0, "--crop": any(self.pad),
            "--auto-augment": self.policy is not None, "--grow-from and --multi-scale": self.sizes is not None,
        }  # fmt: skip
        mixing = {"--mixup": config.mixup > 0, "--cutmix": config.cutmix > 0}
        return [flag for flag, on in ((spatial if raw else {}) | mixing).items() if on]

    def _ready(self, images: Tensor, size: Sequence[int]) -> Tensor:
        return self.preprocess.normalise(resized(self._vary(images), size, self.preprocess.interpolation))

    def _vary(self, images: Tensor) -> Tensor:
        """uint8 -> float in [0, 1]."""
        config, shape = self.config, images.shape
        images = images.flatten(1, -3)  # (B, T·C, H, W): what moves a clip moves all its frames alike
        images = pad_and_crop(images, self.pad[0], self.pad[1], config.pad_mode) if any(self.pad) else images
        images = flip(images, config.flip, -1) if config.flip else images
        images = flip(images, config.flip_vertical, -2) if config.flip_vertical else images
        images = self._recolour(images.float().div_(255), shape)
        return (erase(images, config.erase) if config.erase else images).reshape(shape)

    def _recolour(self, images: Tensor, shape: torch.Size) -> Tensor:
        """Jitter and policy on (B·T, C, H, W), drawn for the B clips and repeated for their T frames."""
        frames = shape[1] if len(shape) == 5 else 1
        flat = images.reshape(-1, *shape[-3:])
        flat = jitter(flat, self.config.color_jitter, frames) if self.config.color_jitter else flat
        if self.policy:
            drawn = self.policy(shape[0], shape[-2], shape[-1])
            drawn = Drawn(*(part.repeat_interleave(frames, 0) for part in drawn))
            flat = apply_operations(flat, drawn, torch.tensor(self.preprocess.mean))
        return flat.reshape(images.shape)

    def _labels(self, batch: Batch) -> Tensor:
        """(B, K) shares of classes: none of any for an image without a label."""
        label, count = batch["label"], self.num_classes
        if label.is_floating_point():
            if label.shape[-1] != count:
                raise ValueError(f"labels to be mixed are shares of {count} classes; got shape {tuple(label.shape)}")
            return label
        on_cpu = label.device.type == "cpu"  # reading from an accelerator waits for it
        label = label.long()
        known = label != UNLABELLED
        if on_cpu and not bool((~known | ((label >= 0) & (label < count))).all()):
            low, high = int(label.min()), int(label.max())
            raise ValueError(f"labels to be mixed must lie in 0 … {count - 1}; got {low} … {high}: mend the labels")
        return F.one_hot(label.where(known, 0), count) * known[:, None].to(torch.float32)

    def _mix(self, images: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        cut = bool(config.cutmix) and (not config.mixup or torch.rand(()).item() < 0.5)
        alpha = config.cutmix if cut else config.mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        partner = torch.randperm(len(images)).to(images.device)
        return (cutmix if cut else mixup)(images, soft, partner, share)


def _policy(config: AugmentConfig, preprocess: Preprocess) -> Callable[[int, int, int], Drawn] | None:
    if config.auto_augment == "rand":
        return partial(
            draw_rand, ops=config.rand_ops, magnitude=config.rand_magnitude, std=config.rand_std,
            chance=config.rand_chance,
        )  # fmt: skip
    fitting = "cifar10" if max(preprocess.img_size) <= SMALL_SIDE else "imagenet"
    return POLICIES.get(fitting if config.auto_augment == "auto" else config.auto_augment)


def pad_and_crop(images: Tensor, pad_y: int, pad_x: int, mode: PadMode = "zero") -> Tensor:
    """Pads (B, C, H, W) and cuts H x W out again, at a place of its own for each image."""
    count, height, width = len(images), images.shape[-2], images.shape[-1]
    if mode == "zero":
        padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    else:  # by index: torch's own takes no uint8 on a GPU
        y, x = _mirrored(height, pad_y).to(images.device), _mirrored(width, pad_x).to(images.device)
        padded = images[..., y[:, None], x]
    top, left = torch.randint(2 * pad_y + 1, (count,)), torch.randint(2 * pad_x + 1, (count,))
    places = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2·pad + 1, 2·pad + 1, H, W), a view
    rows, top, left = (index.to(images.device) for index in (torch.arange(count), top, left))
    return places[rows, :, top, left]


def _mirrored(size: int, pad: int) -> Tensor:
    """(size + 2·pad,) the row that stands at each place when rows are reflected at both edges."""
    place = torch.arange(-pad, size + pad).abs()
    return ((size - 1) - (size - 1 - place).abs()).clamp(min=0)


def flip(images: Tensor, chance: float, dim: int) -> Tensor:
    """Each image mirrored along `dim` with probability `chance`."""
    chosen = (torch.rand(len(images)) < chance).to(images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(dim), images)


def jitter(images: Tensor, strength: float, frames: int = 1) -> Tensor:
    """Brightness, contrast and saturation of each image by up to ±`strength`, in an order drawn for the batch.

    Every `frames` images that follow each other get the same.
    """
    steps = (brightness, contrast, colour)
    for number in torch.randperm(len(steps)).tolist():
        level = (torch.rand(len(images) // frames) * 2 - 1) * strength
        images = steps[number](images, level.repeat_interleave(frames).to(images))
    return images


def erase(images: Tensor, chance: float) -> Tensor:
    """Random erasing (Zhong et al. 2020, algorithm 1): a rectangle of uniform noise over some images.

    It covers 2 to 40 % of the image with an aspect ratio of 0.3 to 3.3, cut where a side is longer than the image's.
    """
    count, height, width = len(images), images.shape[-2], images.shape[-1]
    chosen = torch.rand(count) < chance
    area = torch.empty(count).uniform_(*ERASE_AREA) * height * width
    aspect = torch.empty(count).uniform_(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])).exp()
    inside = _spans((area * aspect).sqrt(), height)[:, :, None] & _spans((area / aspect).sqrt(), width)[:, None, :]
    mask = (inside & chosen[:, None, None])[:, None].to(images.device)  # (B, 1, H, W)
    return torch.where(mask, torch.rand_like(images), images)


def _spans(length: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size): true along a span of that length at a random place."""
    length = length.round().clamp(1, size)
    start = (torch.rand(len(length)) * (size - length + 1)).floor()
    place = torch.arange(size)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def mixup(images: Tensor, labels: Tensor, partner: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """x = λ x_i + (1 - λ) x_j, and the labels alike (Zhang et al. 2018, section 2), λ being `share`."""
    return images.lerp(images[partner], 1 - share), labels.lerp(labels[partner], 1 - share)


def cutmix(images: Tensor, labels: Tensor, partner: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A box of the partner's image is pasted in, one place for the batch (Yun et al. 2019, section 3.1).

    The box has the share 1 - λ of the area; where it hangs over the edge it is cut, and λ becomes the exact rest.
    """
    height, width = images.shape[-2:]
    (top, bottom), (left, right) = (_cut(side, share) for side in (height, width))
    images = images.clone()
    images[..., top:bottom, left:right] = images[partner, ..., top:bottom, left:right]
    rest = 1 - (bottom - top) * (right - left) / (height * width)
    return images, labels.lerp(labels[partner], 1 - rest)


def _cut(side: int, share: float) -> tuple[int, int]:
    centre, half = int(torch.randint(side, ())), side * math.sqrt(1 - share) / 2
    return max(0, round(centre - half)), min(side, round(centre + half))

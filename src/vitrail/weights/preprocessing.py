"""How images were prepared for somebody's weights, read from what stands beside them.

    timm           pretrained_cfg            input_size, mean, std, interpolation, crop_pct, crop_mode
    transformers   preprocessor_config.json  size, crop_size, crop_pct, resample, image_mean, image_std, do_…

                                                        as `Preprocess`
    pressed into a size (ViT, BEiT, PVT, SigLIP …)      "squash"
    pressed into a size, its middle cut out (DeiT)      "squash", crop_pct
    short side resized, middle cut out (CLIP, DINOv2)   "center", crop_pct
    the same by a share, or pressed from 384 (ConvNeXt) "center", crop_pct, or "squash"

What is left out has that library's own default (timm 1.0.31, transformers 5.23). What a `Preprocess` cannot say is
taken as near as it can, and a remark names the field, and what is done in its place. Pixels that are scaled by another
factor than 1 / 255 are no such case: (f x − mean) / std is (x / 255 − mean / 255 f) / (std / 255 f).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard, get_args

from vitrail.folder import LIMITS, MAX_NUMBER
from vitrail.names import shortened
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.weights.published import CLIP, HALF, IMAGENET, CropMode, Filter, Stats

PROCESSOR = "preprocessor_config.json"
RESAMPLING = {"2": "bilinear", "3": "bicubic"}
"""Pillow's numbers, as transformers writes them"""
OTHER_FILTERS = {"0": "nearest", "1": "lanczos", "4": "box", "5": "hamming"}
NOTHING = "nothing there says how images are prepared"
Config = Mapping[str, Any]
Sides = tuple[int, int]
TIMM: Config = {
    "input_size": [3, 224, 224], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "interpolation": "bicubic",
    "crop_pct": 0.875, "crop_mode": "center",
}  # fmt: skip
WARPED = 384
"""from this size on ConvNeXt's images are pressed, not cut"""
LEAST, TINY = 0.01, 1e-9
"""the smallest share of a picture that is cut out, and the smallest factor of its pixels"""


class Prepared(NamedTuple):
    """What is known of how images are prepared."""

    preprocess: Preprocess | None = None
    remarks: tuple[str, ...] = ()
    """what the files say that is taken otherwise, and how"""


class Cut(NamedTuple):
    """The part of `Preprocess` that says which pixels are seen."""

    img_size: Sides
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"


# ---- timm


def of_timm(config: Config) -> Prepared:
    """What timm's `pretrained_cfg` says."""
    given = {name: config[name] for name in TIMM if config.get(name) is not None}
    if not given:
        return Prepared(None, (NOTHING,))
    said, remarks = {**TIMM, **given}, list[str]()
    size = said["input_size"]
    known = isinstance(size, list) and len(size) == 3 and _is_number(size[0])
    stats = _stats(said, ("mean", "std"), size[0] if known else len(IMAGENET_MEAN), remarks)
    sides = _pair(size[1:]) if known else None
    if sides is None:
        remarks.append(f"input_size={shortened(size)} is no size: here the network's own is taken")
    cut = Cut(sides or (224, 224), _share(said["crop_pct"], remarks), _mode(said["crop_mode"], remarks))
    return _prepared(stats, cut, _filter("interpolation", said["interpolation"], remarks), remarks)


def _mode(mode: object, remarks: list[str]) -> CropMode:
    found = _like(CropMode, mode)
    if found is None:
        remarks.append(f"crop_mode={shortened(mode)}: here the short side is resized and the centre cut out")
    return found or "center"


def _share(share: object, remarks: list[str]) -> float:
    """A part of a picture: of one larger than the whole the rest would be black, of a tiny one the picture enormous."""
    if isinstance(share, int | float) and LEAST <= share <= 1:
        return float(share)
    remarks.append(f"crop_pct={shortened(share)}: here it is 1.0")
    return 1.0


# ---- transformers


def _usual(resample: int, stats: Stats, size: Config, **more: Any) -> Config:
    """A class of transformers' processors, by the words of its files; `square`: one number is a height and a width."""
    mean, std = (list(values) for values in stats)
    return {"resample": resample, "image_mean": mean, "image_std": std, "size": size} | more


ALL: Config = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 2,
    "square": True,
}  # fmt: skip
"""what all processors do where nothing else is said"""
SQUARE: Config = {"height": 224, "width": 224}
MIDDLE: Config = {"do_center_crop": True, "crop_size": SQUARE}
BY_CLIP = _usual(3, CLIP, {"shortest_edge": 224}, square=False, **MIDDLE)
PROCESSORS: dict[str, Config] = {
    "Beit": _usual(3, HALF, SQUARE, crop_size=SQUARE),
    "Bit": BY_CLIP,
    "CLIP": BY_CLIP,
    "ConvNext": _usual(3, HALF, {"shortest_edge": WARPED}, square=False, crop_pct=0.875),
    "DINOv3ViT": _usual(2, IMAGENET, SQUARE),
    "DeiT": _usual(3, HALF, {"height": 256, "width": 256}, **MIDDLE),
    "Pvt": _usual(3, IMAGENET, SQUARE),
    "Siglip": _usual(3, HALF, SQUARE, square=False),
    "ViT": _usual(2, HALF, SQUARE),
}
"""what a processor does that its file does not say, by the first part of its class's name"""
KINDS = {
    "beit": "Beit", "clip": "CLIP", "clip_vision_model": "CLIP", "convnext": "ConvNext", "deit": "DeiT",
    "dinov2": "Bit", "dinov2_with_registers": "Bit", "dinov3_vit": "DINOv3ViT", "pvt": "Pvt", "pvt_v2": "Pvt",
    "resnet": "ConvNext", "siglip": "Siglip", "siglip_vision_model": "Siglip", "swin": "ViT", "vit": "ViT",
}  # fmt: skip
"""by `model_type`, whose processor it is where a file does not name one"""
PUBLISHED: dict[str, tuple[str, Stats]] = {
    "clip": ("CLIP", CLIP), "clip_vision_model": ("CLIP", CLIP),
    "dinov2": ("DINOv2", IMAGENET), "dinov2_with_registers": ("DINOv2", IMAGENET), "dinov3_vit": ("DINOv3", IMAGENET),
    "siglip": ("SigLIP", HALF), "siglip_vision_model": ("SigLIP", HALF), "beit": ("BEiT", HALF),
}  # fmt: skip
"""by `model_type`, whose published weights have which mean and deviation; their class of processor may have others"""


def of_transformers(processor: Config | None, kind: str, network: object = None) -> Prepared:
    """What a `preprocessor_config.json` says beside a network of this `model_type` and `image_size`.

    The file is None where it is damaged, empty where there is none.
    """
    own = _pair(network) or (224, 224)
    if not processor:
        return _of_kind(kind, own, NOTHING if processor is not None else f"{PROCESSOR} is damaged")
    name = re.sub("(ImageProcessor|FeatureExtractor).*", "", _type(processor)) or KINDS.get(kind, "")
    given = {field: value for field, value in processor.items() if value is not None}
    said, remarks = {**ALL, **PROCESSORS.get(name, {}), **given}, list[str]()
    stats = _stats(said, ("image_mean", "image_std"), len(IMAGENET_MEAN), remarks)
    cut = _cut(said, own, remarks)
    return _prepared(_scaled(stats, said, remarks), cut, _resample(said["resample"], remarks), remarks)


def _of_kind(kind: str, own: Sides, reason: str) -> Prepared:
    """Where no file says anything."""
    if kind not in PUBLISHED:
        return Prepared(None, (reason,))
    name, (mean, std) = PUBLISHED[kind]
    remarks = (reason, f"mean and std are those of {name}'s published weights")
    return Prepared(Preprocess(img_size=own, mean=mean, std=std), remarks)


def _type(processor: Config) -> str:
    names = (processor.get(field) for field in ("image_processor_type", "feature_extractor_type"))
    return next((name for name in names if isinstance(name, str)), "")


def _cut(said: Config, network: Sides, remarks: list[str]) -> Cut:
    """From `size` and `crop_size` to what `Preprocess` knows; the network's own size where none is said."""
    size, edge = _pair(said.get("size"), said["square"]), _edge(said.get("size"), said["square"])
    middle = _pair(said.get("crop_size")) if said.get("do_center_crop") else None
    if not said["do_resize"]:
        remarks.append("do_resize=False: here the short side is resized and the centre cut out")
        return Cut(middle or size or network)
    if edge is not None:
        return _of_short_side(edge, middle, said, remarks)
    if size is None:
        remarks.append(f"size={shortened(said.get('size'))}: here the short side is resized and the centre cut out")
        return Cut(middle or network)
    return Cut(middle or size, _share_of(middle, size, said, remarks) if middle else 1.0, "squash")


def _of_short_side(edge: int, middle: Sides | None, said: Config, remarks: list[str]) -> Cut:
    """ConvNeXt says a share, and others the part that is cut out."""
    square = (edge, edge)
    if "crop_pct" in said:
        return Cut(square, _share(said["crop_pct"], remarks)) if edge < WARPED else Cut(square, crop_mode="squash")
    if middle is None:
        remarks.append(f"size={shortened(said['size'])} without a cut: here the centre is cut out")
        return Cut(square)
    return Cut(middle, _share_of(middle, square, said, remarks))


def _share_of(middle: Sides, large: Sides, said: Config, remarks: list[str]) -> float:
    """The `crop_pct` by which `middle` is cut out of a picture that was resized to `large`."""
    share = min(1.0, *(side / whole for side, whole in zip(middle, large, strict=True)))
    near = (share, math.nextafter(share, 0))  # by rounding, the first may lose a pixel
    made = next((one for one in near if tuple(math.floor(side / one) for side in middle) == large), None)
    if made is None:
        words = ", ".join(f"{name}={shortened(said[name])}" for name in ("size", "crop_size"))
        remarks.append(f"{words}: here {middle[0]} x {middle[1]} is cut out by crop_pct={share:.3g}")
    return made or share


def _edge(size: object, square: bool) -> int | None:
    """What a picture's short side becomes, where that is all that is said."""
    said = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else None if square else size
    return said if _is_number(said) else None


def _scaled(stats: Stats | None, said: Config, remarks: list[str]) -> Stats | None:
    """Mean and deviation of pixels in [0, 1], where they are of pixels by another factor, or there are none."""
    factor = said["rescale_factor"] if said["do_rescale"] else 1
    if not _is_finite(factor) or factor < TINY:
        remarks.append(f"rescale_factor={shortened(factor)}: here pixels are divided by 255")
        factor = 1 / 255
    if stats is None:
        return None
    mean, std = stats if said["do_normalize"] else ((0.0,) * len(stats[0]), (1.0,) * len(stats[0]))
    scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-4) else factor * 255
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _resample(number: object, remarks: list[str]) -> Filter:
    """By Pillow's number."""
    name = {**RESAMPLING, **OTHER_FILTERS}.get(str(number), "")
    return _filter("resample", name or number, remarks)


# ---- both


def _stats(said: Config, names: tuple[str, str], channels: int, remarks: list[str]) -> Stats | None:
    """Mean and deviation, a number a channel each; one number is all channels'."""
    mean, std = (_numbers(said.get(name)) for name in names)
    channels = max(channels if len(values) == 1 else len(values) for values in (mean, std))
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    if all(map(_is_finite, (*mean, *std))) and len(mean) == len(std) and min(std, default=0) > 0:
        return mean, std
    words = " and ".join(f"{name}={shortened(said.get(name))}" for name in names)
    remarks.append(f"{words} are no mean and deviation: here the network's own are taken")
    return None


def _numbers(said: Any) -> tuple[Any, ...]:
    return tuple(said) if isinstance(said, list) else (said,)


def _filter(field: str, name: object, remarks: list[str]) -> Filter:
    found = _like(Filter, name)
    if found is None:
        remarks.append(f"{field}={shortened(name)}: here pictures are resized by bicubic")
    return found or "bicubic"


def _like(words: Any, said: object) -> Any:
    """That of a `Literal`'s words which is said; None for what is none of them."""
    return next((word for word in get_args(words) if word == said), None)


def _prepared(stats: Stats | None, cut: Cut, interpolation: Filter, remarks: list[str]) -> Prepared:
    if stats is None:
        return Prepared(None, tuple(remarks))
    mean, std = stats
    made = Preprocess(mean=mean, std=std, interpolation=interpolation, **cut._asdict())
    return Prepared(made, tuple(remarks))


def _pair(size: object, square: bool = True) -> Sides | None:
    """Height and width; of one number, where that is a square's."""
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    sides = [sides] * 2 if square and not isinstance(sides, list) else sides
    if not isinstance(sides, list) or len(sides) != 2 or not all(map(_is_number, sides)):
        return None
    return sides[0], sides[1]


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LIMITS["img_size"]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER

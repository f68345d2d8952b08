"""What has been published for the rows of the registry: facts of timm 1.0.31, torchvision 0.29 and the authors.

A line is one row of the registry, one kind of preparation, and the tags of all weights that share it. On timm's hub a
repository is called `row.tag`. Nothing here was fetched to write it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, Preprocess

Filter = Literal["bilinear", "bicubic"]
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ZERO = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
Stats = tuple[tuple[float, ...], tuple[float, ...]]


class Published(NamedTuple):
    """Weights of one row that share their preparation."""

    row: str
    tags: str
    """several, a space between"""
    place: str
    """`hub:timm`, or the URL of the one tag"""
    licence: str
    preprocess: Preprocess
    keys: str
    """whose names their tensors have"""


def _hub(row: str, tags: str, stats: Stats, size: int, crop: float, by: Filter, licence: str) -> Published:
    return Published(row, tags, "hub:timm", licence, _prepared(stats, size, crop, by), "timm")


def _url(
    row: str, tag: str, url: str, stats: Stats, size: int, crop: float, by: Filter, licence: str, keys: str
) -> Published:
    return Published(row, tag, url, licence, _prepared(stats, size, crop, by), keys)


def _prepared(stats: Stats, size: int, crop: float, by: Filter) -> Preprocess:
    return Preprocess(img_size=(size, size), mean=stats[0], std=stats[1], interpolation=by, crop_pct=crop)


# fmt: off
ON_THE_HUB = (
    _hub("vit_tiny_patch16_224", "augreg_in21k_ft_in1k augreg_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_tiny_patch16_384", "augreg_in21k_ft_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_small_patch16_224", "augreg_in21k_ft_in1k augreg_in1k augreg_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_small_patch16_224", "dino", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_small_patch32_224", "augreg_in21k_ft_in1k augreg_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_small_patch16_384", "augreg_in21k_ft_in1k augreg_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_small_patch32_384", "augreg_in21k_ft_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_base_patch16_224", "augreg2_in21k_ft_in1k augreg_in1k augreg_in21k augreg_in21k_ft_in1k orig_in21k orig_in21k_ft_in1k sam_in1k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_base_patch16_224", "dino", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_base_patch16_224", "mae", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0"),
    _hub("vit_base_patch32_224", "augreg_in21k_ft_in1k augreg_in1k augreg_in21k orig_in21k sam_in1k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_base_patch16_384", "augreg_in21k_ft_in1k augreg_in1k orig_in21k_ft_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_base_patch32_384", "augreg_in21k_ft_in1k augreg_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_large_patch16_224", "augreg_in21k_ft_in1k augreg_in21k orig_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_large_patch16_224", "mae", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0"),
    _hub("vit_large_patch32_224", "orig_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_large_patch16_384", "augreg_in21k_ft_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_large_patch32_384", "orig_in21k_ft_in1k", HALF, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("vit_huge_patch14_224", "orig_in21k", HALF, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("vit_huge_patch14_224", "mae", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0"),
    _hub("cait_xxs24_224", "fb_dist_in1k", IMAGENET, 224, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_xxs24_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_xxs36_224", "fb_dist_in1k", IMAGENET, 224, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_xxs36_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_xs24_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_s24_224", "fb_dist_in1k", IMAGENET, 224, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_s24_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_s36_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_m36_384", "fb_dist_in1k", IMAGENET, 384, 1.0, "bicubic", "apache-2.0"),
    _hub("cait_m48_448", "fb_dist_in1k", IMAGENET, 448, 1.0, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b0", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b1", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b2", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b2_li", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b3", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b4", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("pvt_v2_b5", "in1k", IMAGENET, 224, 0.9, "bicubic", "apache-2.0"),
    _hub("crossvit_tiny_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_small_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_base_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_9_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_15_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_18_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_9_dagger_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_15_dagger_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_18_dagger_240", "in1k", IMAGENET, 240, 0.875, "bicubic", "apache-2.0"),
    _hub("crossvit_15_dagger_408", "in1k", IMAGENET, 408, 1.0, "bicubic", "apache-2.0"),
    _hub("crossvit_18_dagger_408", "in1k", IMAGENET, 408, 1.0, "bicubic", "apache-2.0"),
)
"""timm's files, by timm's names"""
ELSEWHERE = (
    _url("vit_base_patch16_224", "torchvision_imagenet1k_v1", "https://download.pytorch.org/models/vit_b_16-c867db91.pth", IMAGENET, 224, 0.875, "bilinear", "bsd-3-clause", "torchvision"),
    _url("vit_base_patch16_384", "torchvision_imagenet1k_swag_e2e_v1", "https://download.pytorch.org/models/vit_b_16_swag-9ac1b537.pth", IMAGENET, 384, 1.0, "bicubic", "cc-by-nc-4.0", "torchvision"),
    _url("vit_base_patch16_224", "torchvision_imagenet1k_swag_linear_v1", "https://download.pytorch.org/models/vit_b_16_lc_swag-4e70ced5.pth", IMAGENET, 224, 1.0, "bicubic", "cc-by-nc-4.0", "torchvision"),
    _url("vit_base_patch32_224", "torchvision_imagenet1k_v1", "https://download.pytorch.org/models/vit_b_32-d86f8d99.pth", IMAGENET, 224, 0.875, "bilinear", "bsd-3-clause", "torchvision"),
    _url("vit_large_patch16_224", "torchvision_imagenet1k_v1", "https://download.pytorch.org/models/vit_l_16-852ce7e3.pth", IMAGENET, 224, 0.9256, "bilinear", "bsd-3-clause", "torchvision"),
    _url("vit_large_patch16_224", "torchvision_imagenet1k_swag_linear_v1", "https://download.pytorch.org/models/vit_l_16_lc_swag-4d563306.pth", IMAGENET, 224, 1.0, "bicubic", "cc-by-nc-4.0", "torchvision"),
    _url("vit_large_patch32_224", "torchvision_imagenet1k_v1", "https://download.pytorch.org/models/vit_l_32-c7638314.pth", IMAGENET, 224, 0.875, "bilinear", "bsd-3-clause", "torchvision"),
    _url("vit_huge_patch14_224", "torchvision_imagenet1k_swag_linear_v1", "https://download.pytorch.org/models/vit_h_14_lc_swag-c1eb923e.pth", IMAGENET, 224, 1.0, "bicubic", "cc-by-nc-4.0", "torchvision"),
    _url("resnet18_224", "torchvision_imagenet1k_v1", "https://download.pytorch.org/models/resnet18-f37072fd.pth", IMAGENET, 224, 0.875, "bilinear", "bsd-3-clause", "torchvision"),
    _url("vit_small_patch16_224", "authors_dino", "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", IMAGENET, 224, 0.9, "bicubic", "apache-2.0", "authors"),
    _url("vit_base_patch16_224", "authors_dino", "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", IMAGENET, 224, 0.9, "bicubic", "apache-2.0", "authors"),
    _url("vit_base_patch16_224", "authors_mae", "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0", "authors"),
    _url("vit_huge_patch14_224", "authors_mae", "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge.pth", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0", "authors"),
    _url("vit_large_patch16_224", "authors_mae", "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth", IMAGENET, 224, 0.9, "bicubic", "cc-by-nc-4.0", "authors"),
    _url("vit_base_patch16_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_base_patch16_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("vit_base_patch32_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("vit_base_patch32_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_large_patch16_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_large_patch16_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("vit_small_patch16_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_small_patch16_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("vit_small_patch32_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_small_patch32_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("vit_tiny_patch16_224", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz", HALF, 224, 0.9, "bicubic", "apache-2.0", "google"),
    _url("vit_tiny_patch16_384", "google_augreg_in21k_ft_in1k", "https://storage.googleapis.com/vit_models/augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz", HALF, 384, 1.0, "bicubic", "apache-2.0", "google"),
    _url("cait_xxs24_224", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/XXS24_224.pth", IMAGENET, 224, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_xxs24_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/XXS24_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_xxs36_224", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/XXS36_224.pth", IMAGENET, 224, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_xxs36_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/XXS36_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_xs24_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/XS24_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_s24_224", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/S24_224.pth", IMAGENET, 224, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_s24_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/S24_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_s36_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/S36_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_m36_384", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/M36_384.pth", IMAGENET, 384, 1.0, "bicubic", "apache-2.0", "authors"),
    _url("cait_m48_448", "authors_dist_in1k", "https://dl.fbaipublicfiles.com/deit/M48_448.pth", IMAGENET, 448, 1.0, "bicubic", "apache-2.0", "authors"),
)
"""torchvision's and the authors' own files"""
# fmt: on
PUBLISHED: tuple[Published, ...] = ON_THE_HUB + ELSEWHERE

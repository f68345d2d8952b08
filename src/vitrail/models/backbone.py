"""The contract that every network here keeps, so that tasks, explanations and exports need to know no family.

    images (B, C, H, W) ── forward_features ──> the family's own ── forward_head ──> logits (B, K)
           │                                                     └─ pre_logits=True ─> (B, num_features)
           ├── features(indices) ──> Features: maps (B, C_i, h_i, w_i) in image order, and prefix tokens
           └── embed ──> Tokens ── encode(keep, blocks) ──> Tokens            isotropic families only

Every way in takes a `mask` (B, H, W) of padded pixels, for batches that mix sizes.

Legend: `B` batch, `C` channels or width, `H`, `W` pixels, `h`, `w` token grid, `N` tokens, `P` prefix tokens,
`K` classes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail import folder
from vitrail.layers.embed import Filter, Size, pair
from vitrail.layers.rope import Rope
from vitrail.layers.tokens import as_map, keep_tokens
from vitrail.records import ModelCard, Preprocess

LOG = logging.getLogger("vitrail")
DRAWS = {nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_}
"""what PyTorch's own leaves draw their first weights by, and lets be overridden"""


class Features(NamedTuple):
    """Intermediate features, shallow to deep. The stride of a map is `H / h`."""

    maps: list[Tensor]
    """each (B, C_i, h_i, w_i), in image order whatever order the network works in"""
    prefix: list[Tensor]
    """parallel to `maps`: each (B, P_i, C_i) class, distillation or register tokens; P_i may be 0"""


class Tokens(NamedTuple):
    """An image as a sequence, before, between or after blocks. Rows: `prefix` tokens, then image tokens.

    Whoever adds prefix rows (prompts, side data, detection tokens) adds them after the family's own, gives them a row
    of `pos` too while there is one, and raises `prefix`: `tokens._replace(x=…, pos=…, prefix=…)`.
    """

    x: Tensor
    """(B, P + N, C)"""
    pos: Tensor | None
    """(1 or B, P + N, C) what `encode` has yet to add, zero for rows without a position; None once it is added"""
    grid: tuple[int, int]
    """h, w of the whole image"""
    prefix: int
    """P"""
    padding: Tensor | None = None
    """(B, N) true where a patch holds nothing but padded pixels; None where no pixel is padded"""
    cells: Tensor | None = None
    """(B, N) which cell of the grid each image token is, in raster order; None for all cells, N = h * w"""
    rope: Rope | None = None
    """by how much the queries and keys of the image tokens are turned; None in a network without rotary positions"""

    @property
    def shown(self) -> Tensor | None:
        """(B, N) the cell that each image token shows, -1 for padding: a `Layout`'s index. None for all cells."""
        if self.padding is None:
            return self.cells
        cells = torch.arange(self.padding.shape[1], device=self.padding.device) if self.cells is None else self.cells
        return cells.masked_fill(self.padding, -1)

    def on_grid(self) -> tuple[Tensor, Tensor | None]:
        """All cells as a map (B, C, h, w), zero where nothing but padding is, and where that is: (B, h, w) or None."""
        padding = None if self.padding is None else self.padding.unflatten(1, self.grid)
        return as_map(self.x[:, self.prefix :], self.grid, self.padding), padding

    def placed(self, drop: nn.Module) -> Tokens:
        """With their positions added, once, and dropout after that."""
        return self if self.pos is None else self._replace(x=drop(self.x + self.pos), pos=None)

    def kept(self, keep: Tensor) -> Tokens:
        """Only the image tokens named by `keep` (B, K), with the cells and the padding that are theirs."""
        return self._replace(
            x=keep_tokens(self.x, keep, self.prefix),
            padding=None if self.padding is None else self.padding.gather(1, keep),
            cells=keep if self.cells is None else self.cells.gather(1, keep),
            rope=None if self.rope is None else self.rope.kept(keep),
        )


class FeatureInfo(NamedTuple):
    """What one entry of `features()` looks like."""

    num_chs: int
    reduction: float
    """pixels from one row of cells to the next, at the configured size"""
    module: str
    """the submodule whose output it is"""
    reduction_w: float | None = None
    """pixels from one column to the next, where that is another number"""


class PositionTable(NamedTuple):
    """What a learned table of positions belongs to."""

    grid: tuple[int, int]
    """h, w of the cells it has a row for; of a relative table, of the window whose offsets it has a row for"""
    prefix: int = 0
    """rows before those of the grid; of a relative table, after them"""
    relative: bool = False
    """(2h - 1)(2w - 1) + prefix rows of offsets in a window, one column a head, in place of (1, prefix + h·w, C)"""
    filter: Filter = "bicubic"
    """how this family resizes it"""


class Backbone(nn.Module, ABC):
    """A network that turns images into logits, features and, for isotropic families, tokens."""

    family: ClassVar[str]
    """the family's name in the registry"""
    config: Any
    """the frozen config it was built from, kept true by `reset_classifier`"""
    num_features: int
    """width of what the head takes"""
    feature_info: list[FeatureInfo]
    preprocess: Preprocess
    """how images must be prepared for the present weights"""
    classes: tuple[str, ...] = ()
    """names of the logits, empty where unknown"""
    variant: str = ""
    """the registry row it was built from, or empty"""
    images: str = ""
    """one line: what images the present weights are for"""
    weights: str = ""
    """the file or folder that the present weights came from; empty for fresh ones"""

    @property
    def cell(self) -> int:
        """Pixels that the sides of an image are multiples of, unless it is padded: those of the coarsest map."""
        return round(self.feature_info[-1].reduction)

    @property
    def teacher_head(self) -> int | None:
        """From which of `forward_heads` on they are there to learn from a teacher; None where all learn the labels."""
        return None

    @property
    def num_classes(self) -> int:
        """K, as the head has it, whoever put it there; 0 without a head. Of other heads than Linear, the config's."""
        head = self.get_classifier()
        widths = [part.out_features for part in head.modules() if isinstance(part, nn.Linear)]
        other = 0 if isinstance(head, nn.Identity) else self.config.num_classes
        return widths[-1] if widths else int(other)

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """The head that makes logits; of several, the first."""

    @abstractmethod
    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Any:
        """images (B, C, H, W) -> what this family's `forward_head` takes; nobody else looks inside."""

    @abstractmethod
    def forward_heads(self, x: Any) -> tuple[Tensor, ...]:
        """The output of `forward_features` -> the logits (B, K) of each head."""

    @abstractmethod
    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """The output of `forward_features` -> logits (B, K), or (B, num_features) with `pre_logits`."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, C, H, W) -> logits (B, K), the same in training and evaluation.

        Pixels marked in `mask` (B, H, W) are padding: not seen, not pooled.
        """
        return self.forward_head(self._read(images, mask))

    def logits_by_head(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """images (B, C, H, W) -> the logits (B, K) of each head, for losses that tell heads apart."""
        return self.forward_heads(self._read(images, mask))

    def _read(self, images: Tensor, mask: Tensor | None = None) -> Any:
        """As much of `forward_features` as the heads read; a family may spare itself the rest."""
        return self.forward_features(images, mask)

    @abstractmethod
    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """The features after the blocks or stages named by `indices` (from 0, negative from the end).

        An int means the last so many, None means all. `norm` applies the final norm where the family has one. Under a
        `mask`, what stands in cells of nothing but padding is not defined; whoever reads a map leaves these cells out.
        """

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """A new, freshly initialised head for `num_classes` classes; 0 leaves none. Empties `classes`."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fills every parameter and every derived buffer, so that meta -> `to_empty` -> `init_weights` is sound."""

    def position_tables(self) -> dict[str, PositionTable]:
        """Learned tables that belong to a grid or window, by their names: for weights of another size."""
        return {}

    @abstractmethod
    def pixel_weights(self) -> list[str]:
        """Names of the weights that take pixels, for images of other channels: (C, C_in, p, q), or (C, C_in·p·q)."""

    def head_weights(self) -> set[str]:
        """Names of the weights of every head: those whose shapes follow the number of classes."""
        with torch.device("meta"):
            other = type(self)(replace(self.config, num_classes=self.num_classes + 1)).state_dict()
        own = self.state_dict()
        return {name for name, value in other.items() if name not in own or own[name].shape != value.shape}

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beside all biases and norms, that weight decay must leave alone."""

    @abstractmethod
    def layer_groups(self) -> list[list[str]]:
        """Parameter names from input to head, a list a depth, each in one: for layer-wise decay and freezing."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are run again in the backward pass."""

    def feature_indices(self, indices: Sequence[int] | int | None) -> list[int]:
        """Which entries of `feature_info` the argument of `features` names, from 0.

        Raises `ValueError` naming the range if one is outside it.
        """
        depth = len(self.feature_info)
        if isinstance(indices, int) and not 1 <= indices <= depth:
            raise ValueError(f"indices as one number asks for the last so many features, 1 … {depth}; got {indices}")
        if indices is None or isinstance(indices, int):
            indices = range(depth)[-(indices or depth) :]
        wrong = [i for i in indices if not -depth <= i < depth]
        if wrong:
            raise ValueError(f"indices must lie in -{depth} … {depth - 1}: {depth} features are there; got {wrong}")
        return [i % depth for i in indices]

    def card(self, **training: Any) -> ModelCard:
        """What a model folder says of this model; `training` is recorded beside it.

        A head that was put in by hand counts as it is; class names that no longer fit it are left out.
        """
        return ModelCard(
            family=self.family,
            config=asdict(replace(self.config, num_classes=self.num_classes)),
            name=self.variant,
            classes=self.classes if len(self.classes) == self.num_classes else (),
            preprocess=self.preprocess,
            images=self.images,
            training=training,
            version=version("vitrail"),
        )

    def save_pretrained(self, path: str | Path, **training: Any) -> Path:
        """Writes `model.safetensors`, `config.json` and a sha256 manifest, all or nothing. Returns the folder.

        Raises `ValueError` as `check_savable` does.
        """
        self.check_savable()
        return folder.write_folder(Path(path), self.plain_state(), self.card(**training))

    def check_savable(self) -> None:
        """Raises `ValueError` where a model folder could not be loaded: the config must describe every weight.

        Class names and the like must be plain text too.
        """
        folder.card_text(self.card())
        with torch.device("meta"):
            described = type(self)(type(self.config)(**self.card().config)).state_dict()
        own = {name: value.shape for name, value in self.plain_state().items()}
        strange = [name for name in own if name not in described or own[name] != described[name].shape]
        if strange or (missing := sorted(described.keys() - own.keys())):
            names, how = ", ".join((strange or missing)[:3]), "beside" if strange else "missing from"
            raise ValueError(
                f"a model folder holds a network as its config describes it; got {names} {how} that: make heads with "
                "reset_classifier(num_classes), or keep your own network with torch.save(model.state_dict())"
            )

    def plain_state(self) -> dict[str, Tensor]:
        """The state by the names that parameters have without `torch.compile`."""
        return {name.replace("_orig_mod.", ""): value for name, value in self.state_dict().items()}


def usual_preprocess(img_size: Size, in_chans: int) -> Preprocess:
    """ImageNet's mean and deviation for three channels, which most published weights want; a half for others."""
    half = (0.5,) * in_chans
    return (
        Preprocess(img_size=pair(img_size))
        if in_chans == 3
        else Preprocess(img_size=pair(img_size), mean=half, std=half)
    )


def said_preprocess(model: Backbone, given: Preprocess | None) -> Preprocess:
    """How images are to be prepared: as the user says, else as the model's weights want them.

    Where both are known and differ, the logger `vitrail` is told of both.
    """
    own = model.preprocess
    if given is None:
        return own
    names = [name for name in ("img_size", "mean", "std") if getattr(given, name) != getattr(own, name)]
    if model.weights and names:
        pairs = "; ".join(f"{name} {getattr(given, name)}, not {getattr(own, name)}" for name in names)
        LOG.warning("images are prepared otherwise than for the weights of %s: %s", model.weights, pairs)
    return given


@contextmanager
def drawn_once(model: Backbone) -> Iterator[None]:
    """Layers made within get their memory and first weights at its end, by `init_weights`, where the default device is.

    By themselves they would each draw weights first that `init_weights` then draws again.
    """
    device = torch.get_default_device()
    with torch.device("meta"), _Undrawn():
        yield
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()


class _Undrawn(TorchFunctionMode):
    """Leaves the drawing of weights out: without memory it changes nothing, and takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in DRAWS else func(*args, **kwargs)

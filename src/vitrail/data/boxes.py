"""What a list of boxes must be, for a loss over them to mean something.

Legend: `n` boxes of an image, `H`, `W` its height and width in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMED = 3


def check_boxes(boxes: Tensor, classes: Tensor | None, size: tuple[int, int], name: str) -> None:
    """Raises `ValueError`, naming the sample and its first bad boxes, for any that is not finite, empty or outside.

    `boxes` are (n, 4): x0 < x1 and y0 < y1 in pixels of an image of `size` (H, W); (0, 4) for an image without any.
    `classes` is (n,), one for each.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"{name}: boxes must be floats (n, 4), and (0, 4) for an image without any; "
            f"got {tuple(boxes.shape)} of {boxes.dtype}"
        )
    if classes is not None and classes.shape != boxes.shape[:1]:
        raise ValueError(f"{name}: classes must be one a box, ({len(boxes)},); got {tuple(classes.shape)}")
    edge = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    inside = ((boxes >= 0) & (boxes <= edge)).all(dim=1)  # what is no number is neither
    bad = (~(inside & (boxes[:, :2] < boxes[:, 2:]).all(dim=1))).nonzero().flatten().tolist()
    if bad:
        said = "; ".join(f"box {row} is {[round(v, 2) for v in boxes[row].tolist()]}" for row in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ValueError(
            f"{name}: a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1 inside {size[1]} x {size[0]} pixels; "
            f"{said}{more}: mend it or leave it out"
        )

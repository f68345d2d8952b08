"""Makes `src/vitrail/assets/bloodcells` from a checkout of Shenggan/BCCD_Dataset (its `BCCD` folder and `LICENSE`).

    python scripts/make_bloodcells.py PATH/TO/BCCD [OUT]

The photographs (640 x 480) are halved and written as WebP; boxes are halved with them and put into one CSV.
Boxes without area are dropped and named. The same checkout and Pillow give the same bytes.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

SHRINK = 2
QUALITY = 85
SPLITS = ("train", "val", "test")
OUT = Path(__file__).parents[1] / "src/vitrail/assets/bloodcells"
SOURCE = "github.com/Shenggan/BCCD_Dataset at d272fb14"
README = """# bloodcells

{photos} light-microscope photographs of stained blood with {boxes} boxes around red cells (RBC), white cells (WBC)
and platelets. Source: {source}, MIT (see `LICENSE`).

What was changed: the photographs were halved from 640 x 480 to 320 x 240 pixels and stored as WebP, quality {quality};
the boxes were halved with them. Boxes without area were left out: {dropped}.

`photos/NAME.webp`: the photographs. `boxes.csv`: one row a box: `file` (NAME), `split`, `class`, `x0,y0,x1,y1` in
pixels of the shrunk photograph. Splits are the source's own, by photograph.

| split | photographs | RBC | WBC | Platelets |
|---|---|---|---|---|
{table}

`scripts/make_bloodcells.py` makes this folder from the source.
"""


class Row(NamedTuple):
    """One box: photograph, split, class, corners in shrunk pixels."""

    file: str
    split: str
    name: str
    box: tuple[float, float, float, float]

    def has_area(self) -> bool:
        x0, y0, x1, y1 = self.box
        return x1 > x0 and y1 > y0


def read_splits(source: Path) -> dict[str, str]:
    """Photograph name -> split."""
    lists = {split: (source / f"ImageSets/Main/{split}.txt").read_text().split() for split in SPLITS}
    return {name: split for split, names in lists.items() for name in names}


def read_boxes(source: Path, file: str, split: str) -> list[Row]:
    """The rows of one photograph in the order of its annotation."""
    root = ElementTree.parse(source / f"Annotations/{file}.xml").getroot()
    return [Row(file, split, str(found.findtext("name")), _corners(found)) for found in root.iter("object")]


def _corners(found: ElementTree.Element) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (int(found.findtext(f"bndbox/{key}", "")) / SHRINK for key in ("xmin", "ymin", "xmax", "ymax"))
    return x0, y0, x1, y1


def shrink(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        small = image.convert("RGB").resize((image.width // SHRINK, image.height // SHRINK), Image.Resampling.LANCZOS)
    small.save(target, "WEBP", quality=QUALITY, method=6)


def write_boxes(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "split", "class", "x0", "y0", "x1", "y1"))
        writer.writerows((row.file, row.split, row.name, *(f"{value:g}" for value in row.box)) for row in rows)


def readme(rows: list[Row], dropped: list[Row], splits: dict[str, str]) -> str:
    photos, cells = Counter(splits.values()), Counter((row.split, row.name) for row in rows)
    lines = [
        f"| {split} | {photos[split]} | " + " | ".join(str(cells[split, name]) for name in ("RBC", "WBC", "Platelets"))
        for split in SPLITS
    ]
    return README.format(
        photos=len(splits), boxes=len(rows), source=SOURCE, quality=QUALITY,
        dropped=", ".join(f"one {row.name} in {row.file}" for row in dropped), table=" |\n".join(lines) + " |",
    )  # fmt: skip


def main(source: Path, out: Path = OUT) -> None:
    splits = read_splits(source)
    found = [row for file in sorted(splits) for row in read_boxes(source, file, splits[file])]
    rows, dropped = [row for row in found if row.has_area()], [row for row in found if not row.has_area()]
    shutil.rmtree(out / "photos", ignore_errors=True)
    (out / "photos").mkdir(parents=True)
    for file in sorted(splits):
        shrink(source / f"JPEGImages/{file}.jpg", out / f"photos/{file}.webp")
    write_boxes(rows, out / "boxes.csv")
    (out / "README.md").write_text(readme(rows, dropped, splits))
    licence = next(path for path in (source / "LICENSE", source.parent / "LICENSE") if path.exists())
    (out / "LICENSE").write_bytes(licence.read_bytes())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {len(splits)} photographs, {len(rows)} boxes, {len(dropped)} dropped, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))

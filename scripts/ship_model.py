"""A finished run -> a model that ships with the package: fp16 weights, and a README with command and figures.

    python scripts/ship_model.py runs/bloodcells src/vitrail/assets/models/bloodcells

The figures are measured again on the test images, from the fp16 file as it ships.
"""

import json
import sys
from pathlib import Path

import torch

from vitrail.folder import find_folder, read_card, read_weights, write_folder
from vitrail.trainer import evaluate_model

README = """# {name}

{images}.

`{row}`, {parameters:,} parameters, fp16. Made by

    {command}

on {machine}, {date}, in {minutes:.0f} minutes. Measured from this file on the {split} images of `{data}`:

| accuracy | balanced accuracy | calibration error |
|---|---|---|
| {accuracy:.4f} | {balanced_accuracy:.4f} | {ece:.4f} |

Recall by class: {recall}.
"""


def main(run: str, target: str) -> None:
    source = find_folder(run)
    card, weights, facts = read_card(source), read_weights(source), json.loads((Path(run) / "metrics.json").read_text())
    folder = write_folder(target, weights, card, dtype=torch.float16)
    figures = evaluate_model(folder, data=facts["data"])
    recall = ", ".join(f"{name} {value:.3f}" for name, value in zip(card.classes, figures["recall"], strict=True))
    page = README.format(
        name=folder.name, images=card.images, row=card.name, parameters=sum(w.numel() for w in weights.values()),
        command=facts["command"], machine=facts["machine"], date=facts["date"], minutes=facts["seconds"] / 60,
        split="test", data=facts["data"], recall=recall,
        **{name: float(figures[name]) for name in ("accuracy", "balanced_accuracy", "ece")},
    )  # fmt: skip
    (folder.parent / f"{folder.name}.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(*sys.argv[1:])

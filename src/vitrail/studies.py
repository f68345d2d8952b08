"""What each command does that studies models: runs or comparisons -> a table, printed as Markdown.

`vitrail.commands` has those that work with one model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from vitrail.commands import check_matches, out_folder, tell
from vitrail.names import check_choice
from vitrail.train.config import Device, TrainConfig


def parity(
    pattern: Annotated[str, "shell pattern of models, such as 'swin_*'"] = "*",
    /,
    *,
    sources: Annotated[list[str] | None, "timm, torchvision, transformers; by default those installed"] = None,
    double: Annotated[bool, "in float64, where no rounding hides what differs"] = False,
) -> None:
    """Hold models against other libraries' with the same random weights; print the largest differences (Markdown)."""
    import torch

    from vitrail.research.parity import parity_table
    from vitrail.research.peers import SOURCES

    check_matches(pattern)
    for source in sources or ():
        check_choice("--sources", source, SOURCES)
    rows = 0
    for rows, found in enumerate(parity_table(pattern, sources, torch.float64 if double else torch.float32), start=1):
        if rows == 1:
            print("| model | beside | at | logits | features | of | parameters |\n|---|---|---|---:|---:|---:|---:|")
        ours, theirs = found.parameters
        count = f"{ours:,}" if ours == theirs else f"{ours:,}, not {theirs:,}"
        size, far = f"{found.size[0]} x {found.size[1]}", f"{found.logits:.1e} | {found.features:.1e}"
        print(f"| {found.row} | {found.source} | {size} | {far} | {found.compared} | {count} |", flush=True)
    if not rows:
        asked = ", ".join(sources or SOURCES)
        raise ValueError(
            f"there is nothing to hold {pattern!r} against: none of {asked}, if installed, has such a model"
        )


def transfer(
    weights: Annotated[str, "weights to begin with, as train --from takes them"],
    data: Annotated[str, "bloodcells, cifar10, cifar100, imagenet, or folder:PATH"],
    /,
    *,
    strategies: Annotated[list[str] | None, "words of --freeze, or scratch; all by default"] = None,
    seeds: Annotated[int, "runs of each"] = 3,
    epochs: Annotated[int, "epochs of each run"] = 20,
    img_size: Annotated[int | None, "as train's"] = None,
    batch_size: Annotated[int, "images a batch"] = 64,
    data_dir: Annotated[str, "where named data sets lie"] = "data",
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto",
    debug: Annotated[bool, "a few batches an epoch, to see that everything runs"] = False,
    out: Annotated[str, "folder of the runs, the table and its picture"] = "runs/transfer",
) -> None:
    """Fine-tune by every strategy, and print a table of how well each does (Markdown), with intervals."""
    from vitrail.draw.canvas import save_figure
    from vitrail.draw.plots import interval_bars
    from vitrail.files import write_whole
    from vitrail.research.transfer import markdown, transfer_table

    config = TrainConfig(
        from_weights=weights, data=data, epochs=epochs, img_size=img_size, batch_size=batch_size, data_dir=data_dir,
        device=device, debug=debug, out=str(out_folder(out)), warmup_epochs=min(1, epochs / 4),
    )  # fmt: skip
    rows = []
    for row in transfer_table(config, strategies or ("all",), seeds):
        rows.append(row)
        write_whole(Path(out) / "transfer.md", markdown(rows) + "\n")  # what is done is there, whatever comes
    chart = interval_bars({row.strategy: row.balanced for row in rows}, f"balanced accuracy on {data}")
    save_figure(chart, Path(out) / "transfer.png")
    print(markdown(rows))


def ablate(
    config: Annotated[str, "a YAML file, the recipe to take apart"],
    /,
    *,
    seeds: Annotated[int, "runs of each rung"] = 1,
    epochs: Annotated[int | None, "epochs of each run, in place of the recipe's"] = None,
    data_dir: Annotated[str | None, "where named data sets lie, in place of the recipe's"] = None,
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto",
    debug: Annotated[bool, "a few batches an epoch, to see that everything runs"] = False,
    out: Annotated[str, "folder of the runs, the table and its pictures"] = "runs/ablation",
) -> None:
    """Build a recipe up part by part, from SGD, and print what each part brings (Markdown), with intervals."""
    from vitrail.draw.canvas import save_figure
    from vitrail.draw.plots import compared_curves, interval_bars
    from vitrail.files import write_whole
    from vitrail.research.ablate import ablation, curves, markdown, stays

    told: dict[str, Any] = {
        "epochs": epochs,
        "data_dir": data_dir,
        "device": device,
        "debug": debug,
        "out": str(out_folder(out)),
    }
    recipe = replace(
        TrainConfig.from_yaml(config), **{name: value for name, value in told.items() if value is not None}
    )
    rungs, kept = [], stays(recipe)
    for rung in ablation(recipe, seeds):
        rungs.append(rung)
        write_whole(Path(out) / "ablation.md", markdown(rungs, kept) + "\n")  # what is done is there, whatever comes
    chart = interval_bars({rung.name: rung.accuracy for rung in rungs}, f"test accuracy on {recipe.data}")
    save_figure(chart, Path(out) / "ablation.png")
    if compared := curves(rungs):
        save_figure(compared_curves(compared), Path(out) / "augmentation.png")
    print(markdown(rungs, kept))


def tune(
    config: TrainConfig,
    *,
    search: Annotated[list[str] | None, "such as lr=1e-4..1e-2:log drop_path=0..0.3 optimizer=adamw,muon"] = None,
    trials: Annotated[int, "how many there are to be in all, those of an earlier call counted"] = 20,
    pruner: Annotated[str, "median, hyperband or none: which trials end early, by their validation figures"] = "median",
) -> None:
    """Search for the best settings, by validation images alone; print the trials (Markdown) and write best.yaml.

    Takes the flags of train for what all trials share; --max-minutes is for the whole search. The same command goes on.
    """
    from vitrail.draw.canvas import save_figure
    from vitrail.draw.plots import search_chart
    from vitrail.files import write_whole
    from vitrail.research.tune import markdown, tune as trials_of

    place = out_folder("runs/tune" if config.out == TrainConfig.out else config.out)
    for found in trials_of(replace(config, out=str(place)), search or (), trials, pruner):
        write_whole(place / "tune.md", markdown(found) + "\n")  # what is done is there, whatever comes
    tried = {row.number: (row.value, row.state == "complete") for row in found.rows if row.value is not None}
    save_figure(search_chart(tried, found.importance), place / "tune.png")
    print(markdown(found))
    if found.best:
        tell(f"train with what was found: vitrail train --config {place / 'best.yaml'}")

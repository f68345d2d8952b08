"""`ViTTransferLearning`: weights and data of any kind -> a fine-tuned network, by two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import vitrail
from vitrail import ViTTransferLearning
from vitrail.data.pairs import Pairs, classes_of, labels_of
from vitrail.models.registry import build_model
from vitrail.weights.fetch import FetchError
from vitrail.weights.load import load_model

KINDS = ("dark", "grey", "light")


def picture(number: int, side: int = 24) -> Image.Image:
    noise = torch.randint(
        0, 80, (side, side + 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    return Image.fromarray((noise + 85 * (number % 3)).numpy())


class Pictures(Dataset[Any]):
    """As torchvision's: pictures of any size with a label, and what they are called."""

    classes = KINDS

    def __init__(self, count: int = 24) -> None:
        self.targets = [number % 3 for number in range(count)]
        self.read = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        self.read += 1
        return picture(row), self.targets[row]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = build_model("vit_debug", num_classes=7)
    model.classes = tuple("abcdefg")
    return model.save_pretrained(tmp_path / "weights")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(30):
        place = tmp_path / "photos" / KINDS[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(place)
    return tmp_path / "photos"


QUICK: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 6}


def learner(weights: Path, count: int = 3, **options: Any) -> ViTTransferLearning:
    return ViTTransferLearning(pretrained_model=weights, num_classes=count, device="cpu", **options)


def test_it_is_public():
    assert "ViTTransferLearning" in vitrail.__all__


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder(weights: Path, photos: Path, tmp_path: Path, as_text: bool):
    transfer = learner(weights, freeze_backbone=True)
    before = {name: value.clone() for name, value in transfer.model.state_dict().items()}
    history = transfer.fine_tune(dataset=str(photos) if as_text else photos, val_fraction=0.2, **QUICK)
    assert [row["epoch"] for row in history.rows] == [1, 2]
    assert "val_accuracy" in history.rows[-1], "held-out images were drawn"
    changed = {n for n, value in transfer.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"head.weight", "head.bias"}
    answer = transfer.predict(photos / "light" / "2.png")
    assert answer["class"] in KINDS
    saved = load_model(transfer.save(tmp_path / "mine"))
    assert saved.classes == KINDS
    assert torch.equal(saved.head.weight, transfer.model.head.weight)


def test_everything_learns_unless_it_is_frozen(weights: Path, photos: Path):
    transfer = learner(weights)
    before = transfer.model.blocks[0].attn.qkv.weight.detach().clone()
    transfer.fine_tune(photos, **QUICK)
    assert not torch.equal(transfer.model.blocks[0].attn.qkv.weight, before)


def test_a_word_of_freeze_wins_over_the_switch(weights: Path, photos: Path):
    transfer = learner(weights, freeze_backbone=True)
    transfer.fine_tune(photos, freeze="deep_prompts:2", **QUICK)
    assert transfer.model.config.deep_prompts == 2
    assert transfer.predict(picture(1)).label in KINDS


def test_a_data_set_of_pictures(weights: Path):
    data = Pictures()
    transfer = learner(weights)
    history = transfer.fine_tune(Subset(data, range(18)), val_dataset=Subset(data, range(18, 24)), **QUICK)
    assert transfer.model.classes == KINDS
    assert "val_accuracy" in history.rows[0]


def test_a_data_set_of_uint8_tensors_is_normalised_and_one_of_floats_is_ready(
    weights: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    for data in (images, images / 255):
        transfer = learner(weights)
        forward = transfer.model.logits_by_head
        monkeypatch.setattr(
            transfer.model,
            "logits_by_head",
            lambda x, *m, forward=forward: seen.append(x.detach().clone()) or forward(x, *m),
        )
        transfer.fine_tune(TensorDataset(data, labels), epochs=1, batch_size=12, crop="none", flip=0.0)
    assert transfer.model.preprocess.mean == (0.5, 0.5, 0.5)
    assert seen[0].min() < -0.9
    assert seen[1].min() >= 0
    assert transfer.model.classes == ("class 0", "class 1", "class 2")


def test_a_loader(weights: Path):
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)
    transfer = learner(weights)
    history = transfer.fine_tune(DataLoader(data, 4), val_dataset=DataLoader(data, 4), epochs=1)
    assert "val_loss" in history.rows[0]


def test_called_again_it_goes_on(weights: Path, photos: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    transfer = learner(weights, freeze_backbone=True)
    transfer.fine_tune(photos, **QUICK)
    head = transfer.model.head.weight.detach().clone()
    transfer.fine_tune(photos, epochs=1, learning_rate=1e-7, freeze="none")
    assert (transfer.model.head.weight - head).abs().max() < 1e-4
    assert f"{weights}: its head is kept, for the same 3 classes" in caplog.messages


def test_a_head_for_other_classes_does_not_stay(weights: Path):
    """Seven classes as the weights have, but others: what their head says of them means nothing."""
    transfer = learner(weights, 7)
    head = transfer.model.head.weight.detach().clone()
    data = TensorDataset(torch.randn(14, 3, 32, 32), torch.arange(14) % 7)
    transfer.fine_tune(data, epochs=1, learning_rate=1e-9)
    assert (transfer.model.head.weight - head).abs().max() > 1e-3


def test_a_run_folder_and_the_best_epoch(weights: Path, photos: Path, tmp_path: Path):
    transfer = learner(weights)
    transfer.fine_tune(photos, out=tmp_path / "run", val_fraction=0.2, **QUICK)
    assert torch.equal(load_model(tmp_path / "run").head.weight, transfer.model.head.weight)


def test_a_size_and_bands_of_its_own(weights: Path):
    transfer = learner(weights, img_size=48, bands=("red", "green", "blue", "infrared"))
    assert transfer.model.config.img_size == (48, 48)
    assert transfer.model(torch.randn(1, 4, 48, 48)).shape == (1, 3)


def test_a_network_as_it_is():
    model = build_model("vit_debug", num_classes=3)
    transfer = ViTTransferLearning(model, 3)
    assert transfer.model is model
    assert ViTTransferLearning(model, 5).model.num_classes == 5


@pytest.mark.parametrize("kind", ["folder", "dataset", "loader"])
def test_other_many_classes_are_refused(weights: Path, photos: Path, kind: str):
    data = {"folder": photos, "dataset": Pictures(), "loader": DataLoader(Pictures())}[kind]
    with pytest.raises(
        ValueError, match=r"made for num_classes=4; .* has 3 classes \(dark, grey, light\): make it with"
    ):
        learner(weights, 4).fine_tune(data)


def test_a_label_out_of_range_is_refused(weights: Path):
    data = TensorDataset(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(
        ValueError, match=r"labels must lie in 0 … 2, for num_classes=3; TensorDataset has 3: make ViTTr"
    ):
        learner(weights).fine_tune(data)


def test_settings_that_are_settled(weights: Path, photos: Path):
    with pytest.raises(TypeError, match="fine_tune trains the weights on the data as both are; got drop_path, model"):
        learner(weights).fine_tune(photos, drop_path=0.1, model="vit_tiny")
    with pytest.raises(TypeError, match="fine_tune has no argument 'epoch_count'"):
        learner(weights).fine_tune(photos, epoch_count=3)
    with pytest.raises(TypeError, match="fine_tune takes a folder, a data set of .image, label. or a loader; got 7"):
        learner(weights).fine_tune(7)  # type: ignore[arg-type]


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match=r"vit_base_patch16_224"):
        ViTTransferLearning(pretrained_model="vit_base_patch16_224", num_classes=10, freeze_backbone=True)


# ---- a data set as images


def test_labels_are_read_without_reading_pictures():
    data = Pictures()
    assert labels_of(Subset(data, [4, 2])) == [1, 2]
    assert data.read == 0
    assert classes_of(Subset(Subset(data, [1, 2]), [0])) == KINDS
    assert classes_of(TensorDataset(torch.zeros(1))) == ()


def test_labels_are_read_by_row_where_there_is_no_list():
    data = TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([2, 0, 1]))
    assert labels_of(data) == [2, 0, 1]


def test_rows_keep_their_numbers():
    images = Pairs(Pictures(), KINDS).subset(torch.tensor([5, 3]))
    assert (images.ids, images.labels.tolist(), len(images)) == (["5", "3"], [2, 0], 2)
    assert torch.equal(images[1]["image"], Pairs(Pictures(), KINDS)[3]["image"])
    assert images.counts() == {"dark": 1, "grey": 0, "light": 1}

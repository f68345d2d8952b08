"""Fine-tune a trained network on other images: first its head, then everything with small steps.

Run: python examples/transfer_learning.py

The shipped model, which knows red cells, white cells and platelets, learns here to tell noise by its brightness: two
classes that nobody trained it for. With your own images, name their folder in place of `data`.
"""

import torch
from torch.utils.data import TensorDataset

from vitrail import ViTTransferLearning


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    noise = torch.randint(0, 120, (40, 3, 64, 64), dtype=torch.uint8)
    data = TensorDataset(noise + 100 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels)

    transfer = ViTTransferLearning(pretrained_model="bloodcells", num_classes=2, freeze_backbone=True, device="cpu")
    probe = transfer.fine_tune(dataset=data, epochs=2, learning_rate=1e-2, batch_size=10)
    print(f"the head alone: loss {probe['train_loss'][0]:.3f} -> {probe['train_loss'][-1]:.3f}")

    whole = transfer.fine_tune(dataset=data, epochs=2, learning_rate=1e-4, batch_size=10, freeze="none")
    print(f"everything: loss {whole['train_loss'][0]:.3f} -> {whole['train_loss'][-1]:.3f}")

    for row in (0, 1):
        print(f"an image of class {row}: {transfer.predict(data[row][0])}")


if __name__ == "__main__":
    main()

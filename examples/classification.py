"""From images to a trained classifier and an answer: the shipped blood cells, a small ViT, a few batches an epoch.

python examples/classification.py            # under a minute; take DEBUG away for the real thing
"""

import tempfile
from pathlib import Path

from vitrail import ViTClassifier, ViTTrainer, create_model, get_data_loaders

DEBUG = True
WHITE_CELL = Path(__file__).parent / "images" / "wbc_0.png"


def main() -> None:
    train_loader, val_loader = get_data_loaders("bloodcells", batch_size=64, img_size=64)
    images = train_loader.dataset.images
    print(f"{len(images)} training crops: {images.counts()}")

    model = create_model("vit_nano_patch8_64", num_classes=len(images.classes), drop_path_rate=0.1)
    model.classes = images.classes
    model.preprocess = model.preprocess.replace(mean=images.statistics()[0], std=images.statistics()[1])

    with tempfile.TemporaryDirectory() as folder:
        trainer = ViTTrainer(model, out=Path(folder) / "run")
        history = trainer.train(
            train_loader, val_loader, epochs=2 if DEBUG else 20, learning_rate=1e-3, warmup_epochs=0.5, debug=DEBUG
        )
        best = history.best("val_accuracy")
        print(f"best epoch {best['epoch']:.0f}: validation accuracy {best['val_accuracy']:.1%}")

        classifier = ViTClassifier.from_pretrained(Path(folder) / "run")
        answer = classifier.predict(WHITE_CELL)
        print(f"a white cell is answered {answer['class']} with confidence {answer['confidence']:.1%}")


if __name__ == "__main__":
    main()

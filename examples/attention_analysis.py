"""Where a model looked, as pictures: every head of a layer, a row of layers, the rollout, and the patches themselves.

python examples/attention_analysis.py [IMAGE] [OUT]       # by default a shipped photograph, into out/
"""

import sys
from pathlib import Path

from vitrail import AttentionVisualizer, record_attention, visualize_patch_embedding
from vitrail.explain.maps import rollout

WHITE_CELL = Path(__file__).parent / "images" / "wbc_0.png"


def main(image: str | Path = "", out: str | Path = "out") -> None:
    image, out = image or WHITE_CELL, Path(out)
    visualizer = AttentionVisualizer("bloodcells")

    visualizer.visualize_attention(image, layer_idx=-1, save_path=out / "last_layer_heads.png")
    maps = visualizer.generate_attention_maps(image, layers=[1, 3, 6], heads="mean")
    visualizer.plot_attention_maps(maps, save_path=out / "layers.png")
    visualizer.rollout(image, save_path=out / "rollout.png")
    visualize_patch_embedding(maps.picture, patch_size=8, save_path=out / "patches.png")

    _, ready = visualizer.predictor.look(image)
    with record_attention() as record:
        logits = visualizer.predictor.logits(ready)
    print(f"answer: {visualizer.predictor.answer(logits)[0]}")
    for found in record.maps:
        row = found.weights[0, :, 0, 1:]  # (heads, patches): what the class token weighed
        entropy = -(row * row.clamp(min=1e-9).log()).sum(-1).mean()
        print(f"layer {found.layer}: {found.weights.shape[1]} heads, mean entropy {entropy:.2f} nats")
    print(f"rollout rows sum to {rollout(record.maps).sum(-1).mean():.4f}")
    for path in sorted(out.glob("*.png")):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])

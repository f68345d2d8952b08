"""From the start of a process to an import, and to the first answer, beside timm, as a Markdown table.

    python benchmarks/startup.py --repeats 5

Every figure is of fresh interpreters, in turns; medians. The answer is that of a ViT-B/16 with fresh weights to one
photograph of 640 x 480 pixels, from its file to probabilities.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from clock import machine
from PIL import Image

ANSWERS = {
    "first answer, vitrail": """
from vitrail import Predictor, create_model
model = create_model("vit_base_patch16_224").eval()
assert len(Predictor(model).predict({path!r}).top) == 5
""",
    "first answer, timm": """
import timm, torch
from PIL import Image
model = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open({path!r}).convert("RGB"))[None])
assert len(logits.softmax(-1).topk(5).values[0]) == 5
""",
}
IMPORTS = {
    "import torch": "import torch",
    "import vitrail": "import vitrail",
    "import torch, and vitrail's models": "import torch\nfrom vitrail import Predictor, create_model",
    "import timm": "import timm",
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        codes = IMPORTS | {name: code.format(path=str(path)) for name, code in ANSWERS.items()}
        found = [{name: seconds(code) for name, code in codes.items()} for _ in range(args.repeats + 1)][1:]
    print(f"{machine('cpu', 'timm')}\n\n| from the start of the process | s |\n|---|---:|")
    for name in codes:
        print(f"| {name} | {statistics.median(took[name] for took in found):.2f} |")
    ours, theirs = ANSWERS
    share = statistics.median(took[ours] / took[theirs] for took in found)
    beyond = statistics.median(took["import torch, and vitrail's models"] - took["import torch"] for took in found)
    print(f"\nFirst answer: {share:.2f} of timm's time. Models beyond `import torch`: {beyond:.2f} s.")


if __name__ == "__main__":
    main()

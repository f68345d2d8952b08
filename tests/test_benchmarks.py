"""The benchmarks that need no other library run, on the smallest model; those beside others only in `make bench`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *words: str) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_augmentation_is_a_share_of_a_step() -> None:
    lines = run("augmentation.py", "vit_debug", "--batch", "4", "--repeats", "1").splitlines()
    shares = [float(line.split("|")[5].strip(" %")) for line in lines if line.endswith("% |")]
    assert len(shares) == 3
    assert all(0 < share < 100 for share in shares)


def test_pictures_are_read_in_every_way(tmp_path: Path) -> None:
    for number, size in enumerate([(300, 240), (3400, 2600)]):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{number}.jpg")
    done = run("pictures.py", str(tmp_path), "--batch", "2", "--repeats", "1")
    speeds = [float(line.split("|")[2]) for line in done.splitlines() if line.count("|") == 4 and "." in line]
    assert len(speeds) == 4
    assert min(speeds) > 0
    assert re.search(r"1 of 2 parts were decoded at a smaller size: \d+\.\d dB", done)


@pytest.mark.parametrize("way", ["vitrail, class-token rows of all layers", "timm, all maps by hooks"])
def test_recording_is_measured_beside_the_plain_pass(way: str) -> None:
    row, size = ("vit_debug", "32") if "vitrail" in way else ("test_vit", "160")
    found = json.loads(run("recording.py", row, "--size", size, "--way", way))
    assert found["seconds"] > 0
    assert found["ratio"] > 0
    assert found["megabytes"] >= 0


def test_time_is_a_median_over_rounds_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import clock

    monkeypatch.setattr(clock, "TURN", 0)
    calls: list[str] = []
    made = {name: (lambda name=name: calls.append(name)) for name in ("vitrail", "other")}
    monkeypatch.setattr(clock, "_seconds", lambda call, count, device, timer: call() or len(calls))
    found = clock.rounds(made, repeats=3)
    assert len(found) == 3
    assert sorted(calls) == sorted([*made] * (clock.WARM + 3))
    rounds = [{"vitrail": 1.0, "other": 2.0}, {"vitrail": 2.0, "other": 8.0}, {"vitrail": 4.0, "other": 4.0}]
    assert clock.median(rounds, "vitrail") == 2
    assert clock.ratio(rounds, "other") == 2

"""Recording compiled models, in many threads, and one recording inside another."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch

from vitrail.explain.record import record_attention


class Counting:
    """A compiler that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def test_a_compiled_model_is_recorded_and_runs_compiled_again(images, small_vit):
    model, backend = small_vit(), Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(images)
        runs = backend.runs
        with record_attention() as record:
            compiled(images)
        assert len(record.maps) == 3
        assert backend.runs == runs > 0
        torch.testing.assert_close(compiled(images), before)
    assert backend.runs == 2 * runs


def test_the_stance_that_was_held_comes_back(images, small_vit, stance):
    with torch.compiler.set_stance("eager_on_recompile"):
        with record_attention():
            assert stance() == "force_eager"
            small_vit()(images)
        assert stance() == "eager_on_recompile"


def test_eight_threads_at_once_get_their_own_maps(small_vit, expected_maps):
    model = small_vit()
    images = torch.randn(8, 1, 3, 32, 32)
    barrier, found = threading.Barrier(8), {}

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(4):
            try:
                with record_attention() as record, torch.no_grad():
                    model(images[number])
                    if turn == 3 and number % 2:
                        raise KeyError("half of them fail")
            except KeyError:
                pass
            found[number] = record.maps

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for number in range(8):
        wanted = expected_maps(model, images[number])
        for seen, right in zip(found[number], wanted, strict=True):
            torch.testing.assert_close(seen.weights.double(), right, atol=1e-5, rtol=0)


def test_a_compiled_model_in_many_threads(images, small_vit, expected_maps):
    """Half of them record: each its own maps, and afterwards graphs run again."""
    model, backend = small_vit(), Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = compiled(images)
    found, outputs = {}, {}
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            with torch.no_grad(), record_attention() if number % 2 else nullcontext() as record:
                outputs[number] = compiled(images + number)
            found[number] = record

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for number in range(6):
        torch.testing.assert_close(outputs[number], model(images + number).detach(), atol=1e-4, rtol=1e-4)
    for number in (1, 3, 5):
        for seen, wanted in zip(found[number].maps, expected_maps(model, images + number), strict=True):
            torch.testing.assert_close(seen.weights.double(), wanted, atol=1e-5, rtol=0)
    runs = backend.runs
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain)
    assert backend.runs > runs


def test_another_thread_sees_nothing(images, small_vit):
    model, failures = small_vit(), []
    with record_attention() as record:
        other = threading.Thread(target=lambda: failures.append(model(images).isnan().any()))
        other.start()
        other.join()
        assert record.maps == []
        model(images)
    assert len(record.maps) == 3


def test_one_recording_inside_another(images, small_vit, stance):
    model = small_vit()
    with record_attention() as outer:
        with record_attention(layers=[1], queries="class") as inner:
            model(images)
        assert stance() == "force_eager"
    assert (len(outer.maps), len(inner.maps)) == (3, 1)

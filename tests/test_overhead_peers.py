"""Other libraries may reject a model; our own errors and lack of memory are raised."""

import mmap

import pytest
import torch
from torch import nn

from benchmarks.overhead import norms
from benchmarks.overhead.peers import CONTENDERS, OWN, Unsupported, rejections
from benchmarks.overhead.process_memory import peak_increase
from benchmarks.overhead.trainings import Training
from opacus_pi import PrivacyEngine


def raised(name, error):
    with rejections(name):
        raise error


def test_a_library_that_rejects_a_model_is_unsupported():
    with pytest.raises(Unsupported, match="^ValueError: no such layer$"):
        raised("BackPACK", ValueError("no such layer\nsecond line"))


@pytest.mark.parametrize("name", OWN)
def test_our_own_errors_are_raised(name):
    with pytest.raises(ValueError, match="no such layer"):
        raised(name, ValueError("no such layer"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        KeyboardInterrupt(),
        OSError("disk"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_lack_of_memory_and_other_errors_are_raised(error):
    with pytest.raises(type(error)):
        raised("BackPACK", error)


def test_contenders_agree_with_float64_or_are_left_out(monkeypatch):
    def off(model, x, y):
        return lambda: 1.01 * CONTENDERS["ours"](model, x, y)()

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    batch = model, torch.randn(5, 3, 4), torch.randint(0, 3, (5,))
    named = {name: CONTENDERS[name] for name in (*OWN, "Opacus hooks", "Opacus ghost")}
    monkeypatch.setattr(norms, "CONTENDERS", named | {"off": off})
    found, errors, left_out = norms.prepared(batch)
    assert set(found) == set(named)
    assert list(left_out) == ["off"] and "off by up to 1.0e-02" in left_out["off"]
    assert max(errors[name] for name in named if name in errors) < 1e-5


def test_the_peak_is_that_of_the_call():
    size, page = 64 * 2**20, 4096

    def task():
        with mmap.mmap(-1, size) as memory:  # never memory that is already resident
            memory[::page] = b"x" * (size // page)

    assert 60 < peak_increase(task) < 100


def test_trainings_alike_make_the_same_updates():
    first, second = (Training(PrivacyEngine(), "hooks", "mlp", 8, 2) for _ in range(2))
    for training in (first, second) * 3:
        training.step()
    pairs = zip(first.weights, second.weights, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_repeated_epoch_has_the_same_batches():
    training = Training(None, "plain", "mlp", 8, 2, same_epoch=True)
    labels = [training.next_batch()[1] for _ in range(4)]
    assert torch.equal(labels[0], labels[2]) and torch.equal(labels[1], labels[3])

from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_pi.attribution.samples import (
    StoredSamples,
    places_compared,
    sample_checksums,
    tensors_in,
)


def test_tensors_in_any_nesting():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    nested = {"x": [a, ("text", b)], "y": UserDict(z=c), "w": 3, "v": None, "u": b"x"}
    assert [id(t) for t in tensors_in(nested)] == [id(a), id(b), id(c)]
    assert list(tensors_in("text")) == list(tensors_in(3.0)) == []


def test_tensors_in_a_models_output():
    @dataclass
    class Output:
        logits: torch.Tensor
        aux: tuple

    out = Output(torch.zeros(2), (torch.ones(1),))
    assert [t.numel() for t in tensors_in(out)] == [2, 1]
    assert list(tensors_in(Output)) == []


def test_tensors_without_samples_in_memory_are_left_out():
    packed = pack_padded_sequence(torch.zeros(2, 3), torch.tensor([2, 3]), True, False)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    jagged = torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)
    sparse, meta = torch.eye(2).to_sparse(), torch.zeros(2, device="meta")
    assert list(tensors_in([packed, nested, jagged, sparse, meta])) == []


def test_endless_nesting_ends():
    nested = []
    nested.append(nested)
    assert list(tensors_in(nested)) == []


BATCH = torch.arange(48.0).reshape(4, 3, 4)
VIEWS = {
    "itself": (BATCH, [0, 1, 2, 3]),
    "a slice": (BATCH[1:3], [1, 2]),
    "every second": (BATCH[1::2], [1, 3]),
    "backwards by index": (BATCH[3:4], [3]),
    "other shape": (BATCH.view(4, 12), [0, 1, 2, 3]),
    "some columns": (BATCH[:, 1:, 2:], [0, 1, 2, 3]),
    "one column of one sample": (BATCH[2:3, 2, 3:], [2]),
    "samples twice": (BATCH[1:2].expand(3, 3, 4), [1, 1, 1]),
    "a column of every sample": (BATCH[:, 0, 0], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_recognised_by_their_place(name):
    view, expected = VIEWS[name]
    np.testing.assert_array_equal(StoredSamples(BATCH, 0).positions(view, 0), expected)


OTHERS = {
    "a copy": BATCH.clone(),
    "across two samples": BATCH.flatten()[6:30].view(2, 12),
    "finer samples": BATCH.view(12, 4),
    "transposed": BATCH.transpose(0, 1),
    "no samples": BATCH[:0],
    "other numbers in the same bytes": BATCH.view(torch.float64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_not(name):
    view = OTHERS[name]
    found = StoredSamples(BATCH, 0).positions(view, 0)
    # Entries of one sample still identify it; anything else must not.
    if found is not None:
        samples = BATCH.flatten(1).tolist()
        assert all(
            set(part.flatten().tolist()) <= set(samples[i])
            for i, part in zip(found, view, strict=True)
        )
    assert name in ("finer samples",) or found is None


def test_an_address_that_is_used_again_is_not_the_same_memory():
    batch = torch.zeros(4, 2)
    samples = StoredSamples(batch, 0)
    del batch
    others = [torch.zeros(4, 2) for _ in range(50)]
    assert all(samples.positions(other, 0) is None for other in others)


def test_writes_are_noticed():
    batch = torch.zeros(4, 2)
    samples = StoredSamples(batch, 0)
    assert not samples.modified(batch)
    batch.add_(1)
    assert samples.modified(batch)
    with torch.inference_mode():
        still = torch.zeros(4, 2)
    assert not StoredSamples(still, 0).modified(still)


def test_second_dimension():
    batch = torch.arange(12.0).reshape(3, 4)  # [time, example]
    samples = StoredSamples(batch, 1)
    np.testing.assert_array_equal(samples.positions(batch, 1), [0, 1, 2, 3])
    assert samples.positions(batch, 0) is None


def sums(tensor, dim=0):
    return sample_checksums(tensor, dim)[1].tolist()


def test_checksums_survive_what_copying_does():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    same = [
        x.clone(),
        x.double(),
        x.reshape(5, 12),
        x.flip(0).flip(0),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    assert all(sums(other) == sums(x) for other in same)
    assert sample_checksums(x, 0)[0] == 12
    assert sums(x.transpose(0, 1), dim=1) == sums(x)
    assert sums(x.flip(0)) == sums(x)[::-1]
    small = torch.randint(0, 255, (5, 7), dtype=torch.uint8)
    assert sums(small.float()) == sums(small) == sums(small.long())
    half = x.half()
    assert sums(half.float()) == sums(half)


def test_checksums_distinguish_samples():
    wide = torch.zeros(1, 1000).repeat(1000, 1)
    wide[torch.arange(1000), torch.arange(1000) % 1000] = 1.0
    looked_at = places_compared(1000)
    assert len(set(np.array(sums(wide))[looked_at])) == len(looked_at)
    values = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    assert len(set(sums(values))) == 4000
    assert sums(torch.tensor([[1.0, 2.0]])) != sums(torch.tensor([[2.0, 1.0]]))
    assert sums(torch.tensor([[0.0, 1.0]])) != sums(torch.tensor([[1.0, 0.0]]))


def test_samples_without_a_checksum():
    assert sample_checksums(torch.zeros(0, 3), 0)[0] == 0
    assert sample_checksums(torch.zeros(3, 0), 0)[0] == 0
    assert sample_checksums(torch.zeros(3, 2, dtype=torch.complex64), 0)[0] == 0

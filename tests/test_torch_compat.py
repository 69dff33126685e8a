"""Torch's private names exist, and mean what the package takes them to mean."""

import inspect

import pytest
import torch
from torch.utils.data import DataLoader, dataloader

from opacus_pi import _torch_compat

BASE = dataloader._BaseDataLoaderIter
WITH_WORKERS = dataloader._MultiProcessingDataLoaderIter


def test_writes_in_place_are_counted():
    x = torch.zeros(3)
    before = _torch_compat.num_writes(x)
    x.add_(1)
    assert _torch_compat.num_writes(x) == before + 1
    with torch.inference_mode():
        assert _torch_compat.num_writes(torch.zeros(1).add_(1)) == 0


def test_a_storage_has_an_address_of_its_own():
    x = torch.zeros(3)
    address = _torch_compat.storage_address(x.untyped_storage())
    assert address == _torch_compat.storage_address(x[1:].untyped_storage())
    assert address != _torch_compat.storage_address(x.clone().untyped_storage())
    assert address == _torch_compat.StorageWeakRef(x.untyped_storage()).cdata


def test_outputs_of_modules_with_backward_hooks_are_known():
    layer, seen = torch.nn.Linear(2, 2), []
    assert not _torch_compat.has_backward_hooks(layer(torch.ones(1, 2)))
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_forward_hook(lambda module, args, out: seen.extend(args))
    out = layer(torch.ones(1, 2, requires_grad=True))
    assert _torch_compat.has_backward_hooks(out)
    assert _torch_compat.has_backward_hooks(seen[0])
    with pytest.raises(RuntimeError, match=_torch_compat.BACKWARD_HOOK_FUNCTION):
        out += 1


def test_overridden_methods_of_loaders_are_called_by_torch():
    assert isinstance(DataLoader._index_sampler, property)
    assert "self._get_iterator()" in inspect.getsource(DataLoader.__iter__)
    assert "self._iterator._reset(self)" in inspect.getsource(DataLoader.__iter__)
    initialise = inspect.getsource(BASE.__init__)
    assert "self._index_sampler = loader._index_sampler" in initialise
    assert "self._collate_fn = loader.collate_fn" in initialise
    assert "idx, data = self._get_data()" in inspect.getsource(WITH_WORKERS)


def test_the_position_of_the_batch_returned_last():
    for in_order in (True, False):
        loader = DataLoader(range(6), num_workers=1, in_order=in_order)
        batches = iter(loader)
        for number in range(3):
            next(batches)
            expected = number if in_order else None
            assert _torch_compat.received_position(batches) == expected
        assert _torch_compat.has_workers(batches)


def test_indices_without_loading():
    batches = iter(DataLoader(range(4), 2))
    assert not _torch_compat.has_workers(batches)
    assert _torch_compat.next_index(batches) == [0, 1]
    assert next(batches).tolist() == [2, 3]
    with pytest.raises(StopIteration):
        _torch_compat.next_index(batches)


def test_tensors_of_functional_transforms_are_recognised():
    seen = []

    def look(x):
        seen.append(_torch_compat.is_functorch_wrapped_tensor(x))
        return x.sum()

    look(torch.zeros(2))
    torch.func.grad(look)(torch.zeros(2))
    torch.vmap(look)(torch.zeros(2, 2))
    assert seen == [False, True, True]

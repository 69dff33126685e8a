"""What the package uses of Opacus without a promise is there, and means the same."""

import inspect

import opacus
import pytest
import torch
from opacus.optimizers import optimizer as optimizer_module
from opacus.utils import batch_memory_manager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.integration import opacus_compat
from opacus_pi.integration.mixin import PerInstanceMixin


def prepared(**options):
    """A model, an optimizer and a loader of Opacus's own engine."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    data = TensorDataset(torch.randn(8, 2), torch.randint(2, (8,)))
    hooks, optimizer, *criterion, loader = opacus.PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=4),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **options,
    )
    return net, hooks, optimizer, *criterion, loader


def test_this_release_was_tried():
    assert opacus.__version__ in opacus_compat.SEEN_IN


@pytest.mark.parametrize("name", opacus_compat.OVERRIDDEN_METHODS)
def test_overridden_methods_are_called_by_make_private(name):
    assert name in vars(opacus.PrivacyEngine) and name in vars(PerInstanceMixin)
    assert f"self.{name}(" in inspect.getsource(opacus.PrivacyEngine.make_private)


def test_every_overridden_private_method_is_listed():
    ours = {n for n in vars(PerInstanceMixin) if n.startswith("_") and n[1] != "_"}
    assert ours & set(dir(opacus.PrivacyEngine)) == set(
        opacus_compat.OVERRIDDEN_METHODS
    )


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_modules_and_handles(mode, wrap_model):
    net, hooks, *_ = prepared(grad_sample_mode=mode, wrap_model=wrap_model)
    assert opacus_compat.module_of(hooks) is net
    assert opacus_compat.removable_handles(net)
    handle = net.register_forward_hook(lambda *_: None)
    opacus_compat.keep_handle(net, handle)
    hooks.remove_hooks()
    assert opacus_compat.removable_handles(net) is None and not net._forward_hooks


def test_modes_without_hooks_keep_no_handles():
    net, *_ = prepared(grad_sample_mode="ew")
    assert opacus_compat.removable_handles(net) is None
    handle = net.register_forward_hook(lambda *_: None)
    opacus_compat.keep_handle(net, handle)  # it stays until it is removed by hand
    assert net._forward_hooks


def test_norms_of_ghost_clipping():
    _, model, _, criterion, loader = prepared(grad_sample_mode="ghost")
    parameters = list(model.parameters())
    assert opacus_compat.clipped_norms(model) is None
    assert opacus_compat.norms_of_parameters(parameters) == [None] * 4
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    by_parameter = opacus_compat.norms_of_parameters(parameters)
    joint = torch.stack(by_parameter, dim=1).norm(2, dim=1)
    assert torch.allclose(opacus_compat.clipped_norms(model), joint)
    assert torch.equal(opacus_compat.clipped_norms(model), model.get_norm_sample())


def test_gradients_are_processed_once():
    _, model, optimizer, loader = prepared()
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    (first, *_) = optimizer.params
    opacus_compat.require_unprocessed(first.grad_sample)
    optimizer.clip_and_accumulate()
    with pytest.raises(ValueError, match="haven't been cleared"):
        opacus_compat.require_unprocessed(first.grad_sample)
    fresh = [torch.zeros(1)]
    opacus_compat.require_unprocessed(fresh)
    opacus_compat.mark_as_processed(fresh)
    with pytest.raises(ValueError, match="haven't been cleared"):
        opacus_compat.require_unprocessed(fresh)


def test_noise_as_it_is_shipped(monkeypatch):
    *_, optimizer, _ = prepared()
    assert opacus_compat.draws_shipped_noise(optimizer.add_noise)
    assert not opacus_compat.draws_shipped_noise(lambda: None)
    calls = []
    monkeypatch.setattr(
        optimizer_module, "_generate_noise", lambda **_: calls.append(0) or 0
    )
    assert not opacus_compat.draws_shipped_noise(optimizer.add_noise)
    for p in optimizer.params:
        p.summed_grad = torch.zeros_like(p)
    optimizer.add_noise()  # draws by this function, once for each parameter
    assert len(calls) == len(optimizer.params)


def test_physical_batches_of_one_update():
    _, model, optimizer, loader = prepared()
    x, y = next(iter(loader))
    assert not opacus_compat.has_skipped_last_step(optimizer)
    for skip in (True, False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.signal_skip_step(do_skip=skip)
        optimizer.step()
        assert opacus_compat.has_skipped_last_step(optimizer) == skip


# ------------------------------------------------------------------ BatchMemoryManager


@pytest.fixture
def unpatched():
    """Opacus as it is, whatever was patched before; as it was afterwards."""
    before = batch_memory_manager.wrap_data_loader
    opacus_compat.restore_memory_manager()
    yield batch_memory_manager.wrap_data_loader
    batch_memory_manager.wrap_data_loader = before


def managed(loader, optimizer):
    return batch_memory_manager.BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    )


def test_the_patch_observes_and_is_undone(unpatched):
    *_, optimizer, loader = prepared()
    seen, ignored = [], []
    opacus_compat.patch_memory_manager(lambda *pair: ignored.append(pair))
    opacus_compat.patch_memory_manager(lambda *pair: seen.append(pair))
    with managed(loader, optimizer) as built:
        assert seen == [(loader, built)] and not ignored
    opacus_compat.restore_memory_manager()
    assert batch_memory_manager.wrap_data_loader is unpatched
    with managed(loader, optimizer):
        assert len(seen) == 1
    opacus_compat.restore_memory_manager()  # nothing to undo
    assert batch_memory_manager.wrap_data_loader is unpatched


def test_the_patch_looks_like_what_it_replaces(unpatched):
    opacus_compat.patch_memory_manager(lambda *pair: None)
    patched = batch_memory_manager.wrap_data_loader
    assert inspect.signature(patched) == inspect.signature(unpatched)
    assert patched.__module__ == unpatched.__module__


def test_the_same_function_is_put_in_place_once(unpatched):
    def observe(source, built):
        """Nothing to do."""

    opacus_compat.patch_memory_manager(observe)
    first = batch_memory_manager.wrap_data_loader
    opacus_compat.patch_memory_manager(observe)
    assert batch_memory_manager.wrap_data_loader is first is not unpatched


def test_a_patch_of_others_is_left_alone(unpatched):
    opacus_compat.patch_memory_manager(lambda *pair: None)

    def theirs(**options):
        return unpatched(**options)

    batch_memory_manager.wrap_data_loader = theirs
    opacus_compat.restore_memory_manager()
    assert batch_memory_manager.wrap_data_loader is theirs


def test_the_first_engine_patches_and_only_once(unpatched):
    PrivacyEngine()
    first = batch_memory_manager.wrap_data_loader
    PrivacyEngine()
    assert batch_memory_manager.wrap_data_loader is first is not unpatched
    opacus_compat.restore_memory_manager()
    assert batch_memory_manager.wrap_data_loader is unpatched


def test_a_manager_with_a_wrapped_optimizer_names_the_remedy():
    class Accelerated:
        """A wrapper that passes on some of an optimizer's methods, as Accelerate's."""

    *_, optimizer, loader = prepared()
    PrivacyEngine()  # observes managers
    with managed(loader, optimizer) as built:
        assert len(built) >= 1
    with (
        pytest.raises(ValueError, match="got a Accelerated.*the one from before"),
        managed(loader, Accelerated()),
    ):
        pass

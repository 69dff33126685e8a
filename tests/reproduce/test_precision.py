"""Training and unlearning in bfloat16 and channels_last."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.common.resnet import resnet18
from benchmarks.common.training import PrivateRecipe, Recipe, train_privately
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Oracle
from benchmarks.reproduce.unlearning_runs import unlearn
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.gradients import per_example_grad_norms, sweep

CRITERION = nn.CrossEntropyLoss()
PLAIN = replace(
    SCALES["smoke"].sgd,
    num_train=60,
    num_test=30,
    recipe=Recipe("strided-cnn", 2, 16, 0.1, noise_std=0.01),
    num_seeds=1,
    num_oracles=1,
    set_size=6,
    num_sets=8,
    unlearn_epochs=1,
    num_checkpoints=3,
    num_probe=20,
)
FAST = replace(
    PLAIN, recipe=replace(PLAIN.recipe, precision="bfloat16", channels_last=True)
)
SETTINGS = {"learning_rate": 0.01, "strength": 1e-4}
SETTINGS |= {"selection_weight": 2.0, "dampening": 1.0}


@pytest.fixture
def outputs_seen():
    """The types that the last layers put out, by whether the model was training."""
    seen = {True: set(), False: set()}

    def note(module, inputs, output):
        if isinstance(module, nn.Linear) and module.out_features == 10:
            seen[module.training].add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


def test_only_the_passes_of_updates_are_in_bfloat16(tmp_path, outputs_seen):
    workspace = Workspace(tmp_path)
    model, ledger = workspace.trained(FAST, 0)
    assert outputs_seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert np.isfinite(ledger.grad_norms).all() and len(ledger.grad_norms) == 3


def test_the_default_is_float32(tmp_path, outputs_seen):
    Workspace(tmp_path).trained(PLAIN, 0)
    assert outputs_seen == {True: {torch.float32}, False: {torch.float32}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_unlearns_in_the_precision_of_the_training(
    tmp_path, outputs_seen, method
):
    workspace, forget = Workspace(tmp_path), ForgetSet("range", 6, 7, 8)
    workspace.trained(FAST, 0)
    for types in outputs_seen.values():
        types.clear()
    model, trace = unlearn(workspace, FAST, forget, method, SETTINGS, 0)
    if method != "SSD":  # it makes no updates
        assert outputs_seen[True] == {torch.bfloat16}
    if method != "SCRUB":  # its teacher is in evaluation mode and takes part
        assert outputs_seen[False] == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert np.isfinite(trace.metrics["retain_accuracy"]).all()


def test_models_are_stored_in_the_common_layout_and_placed_in_their_own(tmp_path):
    workspace = Workspace(tmp_path)
    first = workspace.trained(FAST, 0)[0]
    oracle = Oracle(FAST, ForgetSet("range", 6, 7, 8), 0).model(workspace)
    for model in (first, oracle):
        weight = model[2].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    again = Oracle(FAST, ForgetSet("range", 6, 7, 8), 0).model(workspace)
    for a, b in zip(oracle.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_sweeps_do_not_depend_on_the_layout_nor_on_autocast_around_them(norm):
    torch.manual_seed(0)
    model = resnet18((3, 8, 8), norm=norm, width=8).eval()
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    plain = per_example_grad_norms(model, CRITERION, x, y)
    placed = FAST.recipe.place(model, "cpu")
    with FAST.recipe.autocast("cpu"):
        data_set = torch.utils.data.TensorDataset(x, y)
        found = sweep(placed, CRITERION, data_set, batch_size=3).grad_norms
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_bfloat16_training_is_close_to_float32_but_not_the_same(tmp_path):
    still = {"noise_std": 0.0}
    models = [
        Workspace(tmp_path).trained(replace(e, recipe=replace(e.recipe, **still)), 0)[0]
        for e in (PLAIN, FAST)
    ]
    a, b = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    difference = ((a - b).norm() / a.norm()).item()
    assert 1e-6 < difference < 0.05


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"channels_last": True}])
def test_dp_sgd_is_float32_only(tmp_path, change):
    recipe = PrivateRecipe("mlp", 1, 16, 0.1, **change)
    data_set = Workspace(tmp_path).images(PLAIN).train
    with pytest.raises(ValueError, match="DP-SGD needs"):
        train_privately(recipe, data_set, (1, 8, 8), 0)

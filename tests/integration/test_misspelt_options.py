"""Misspelt options of ``make_private`` are named; Opacus's own never are."""

import warnings

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.integration.misspelt_options import misspelt


def prepare(engine, method="make_private", **options):
    net = nn.Linear(2, 2)
    data = TensorDataset(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    given = {
        "module": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=4),
        "max_grad_norm": 1.0,
    }
    if method == "make_private":
        given["noise_multiplier"] = 1.0
    else:
        given |= {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}
    return getattr(engine, method)(**given, **options)


@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("poisson_samplng", "poisson_sampling"),
        ("grad_sample_modes", "grad_sample_mode"),
        ("loss_reductions", "loss_reduction"),
        ("noise_generater", "noise_generator"),
    ],
)
def test_a_misspelt_option_is_named_with_what_was_meant(method, wrong, meant):
    with pytest.warns(UserWarning, match=f"no option {wrong}.*mean {meant}") as caught:
        prepare(PrivacyEngine(accountant="rdp"), method, **{wrong: None})
    named = [w for w in caught if wrong in str(w.message)]
    assert len(named) == 1
    assert (named[0].filename == __file__) == (method == "make_private")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipping": "per_layer", "max_grad_norm": [1.0, 1.0]},
        {
            "clipping": "adaptive",
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 1e8,
            "min_clipbound": 0.1,
            "unclipped_num_std": 1.0,
        },
        {"my_own_option": 3},
    ],
)
def test_no_option_of_opacus_is_named(options):
    assert misspelt(options, PrivacyEngine) == {}


def test_an_option_of_a_derived_engine_is_known():
    class Derived(PrivacyEngine):
        def _prepare_model(self, module, *, loss_reductions="", **others):
            return super()._prepare_model(module, **others)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no option")
        prepare(Derived(accountant="rdp"), loss_reductions="x")
    assert misspelt(["loss_reductions"], opacus.PrivacyEngine)

import copy
import io

import numpy as np
import opacus
import pytest
import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from opacus_pi.accounting import RenyiFilter
from opacus_pi.integration.checkpoints import FILTER_KEY
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.filtering import require_filterable
from opacus_pi.recording import Recorder
from tests.integration.filtered_training import filtered
from tests.private_training import ADAPTIVE, Net, Training, data

N = 24


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"grad_sample_mode": "ghost"},
            "grad_sample_mode='ghost' keeps no.*\"hooks\"",
        ),
        ({"clipping": "adaptive", **ADAPTIVE}, "clipping must .*got 'adaptive'"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be above 0, got 0.0"),
    ],
)
def test_what_make_private_refuses_it_leaves_as_it_was(options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        filtered(1.0, module=net, **options)
    filtered(1.0, module=net).train(1)  # no hooks were left behind


def test_schedules_that_may_look_at_the_data_and_several_processes():
    sampler = WeightedRandomSampler(torch.rand(N), N)
    loader = DataLoader(data(), batch_size=6, sampler=sampler)
    with pytest.raises(ValueError, match="cannot keep budgets.*WeightedRandomSampler"):
        filtered(1.0, loader=loader, poisson_sampling=False)
    filtered(1.0, loader=loader)  # Opacus samples by itself
    replicated = DifferentiallyPrivateDistributedDataParallel
    with pytest.raises(ValueError, match="Train in one process"):
        require_filterable(
            opacus.PrivacyEngine(),
            module=replicated.__new__(replicated),
            data_loader=loader,
            noise_multiplier=1.0,
        )


def test_budgets_of_other_data_and_monitored_training():
    with pytest.raises(ValueError, match="one for each of 24 examples"):
        filtered([1.0, 2.0])
    training = filtered(1.0).train(1)
    other = TensorDataset(data().tensors[0], torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match="Make a new RenyiFilter"):
        Training(engine=training.engine, data_set=other)
    with pytest.raises(ValueError, match="renyi_filter.*make_private"):
        net = Net()
        training.engine.make_monitored(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=6),
            noise_std=0.1,
            criterion=nn.CrossEntropyLoss(),
        )


def test_a_second_run_on_the_same_data_spends_the_same_budgets():
    training = filtered(30.0).train(1)
    spent = training.engine.renyi_filter.spent
    Training(engine=training.engine).train(1)
    again = training.engine.renyi_filter.spent
    assert (again >= spent).all() and again.sum() > spent.sum() > 0


def test_it_is_asked_for_a_target_epsilon_too():
    engine = PrivacyEngine(accountant="rdp", renyi_filter=RenyiFilter(1.0))
    net = Net()
    with pytest.raises(ValueError, match="grad_sample_mode='ghost' keeps no"):
        engine.make_private_with_epsilon(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=6),
            max_grad_norm=1.0,
            target_epsilon=8.0,
            target_delta=1e-5,
            epochs=1,
            grad_sample_mode="ghost",
        )


# ----------------------------------------------------------------------- checkpoints


def save(training):
    file = io.BytesIO()
    training.engine.save_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )
    file.seek(0)
    return file


def load(engine, training, file):
    engine.load_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )


@pytest.mark.parametrize("prepared", [True, False])
def test_a_resumed_run_goes_on_with_the_charges(prepared):
    def start():
        return filtered(
            1.9, noise_multiplier=1.5, shuffle=False, poisson_sampling=False
        )

    whole = start().train(2)
    file, state = save(whole), torch.get_rng_state()
    whole.train(3)
    resumed = start()
    if prepared:
        load(resumed.engine, resumed, file)
    else:
        engine = PrivacyEngine(
            accountant="rdp",
            renyi_filter=RenyiFilter(1.9),
            recorder=Recorder(every=1),
        )
        load(engine, resumed, file)
        weights = copy.deepcopy(resumed.net.state_dict())
        momentum = copy.deepcopy(resumed.optimizer.state_dict())
        resumed = Training(engine=engine, shuffle=False, poisson_sampling=False)
        resumed.optimizer.noise_multiplier = 1.5
        resumed.net.load_state_dict(weights)
        resumed.optimizer.load_state_dict(momentum)
    torch.set_rng_state(state)
    resumed.train(3)
    one, other = whole.engine, resumed.engine
    np.testing.assert_array_equal(one.renyi_filter.spent, other.renyi_filter.spent)
    np.testing.assert_array_equal(one.ledger.grad_norms, other.ledger.grad_norms)
    assert (one.ledger.grad_norms == 0).any()


def test_what_a_checkpoint_holds():
    training = filtered([1.0] * N).train(1)
    state = torch.load(save(training), weights_only=False)[FILTER_KEY]
    assert {type(value) for value in state.values()} <= {torch.Tensor, float, str}
    vanilla = Training(engine=opacus.PrivacyEngine(accountant="rdp"))
    load(vanilla.engine, vanilla, save(training))


def test_checkpoints_that_do_not_fit():
    trained = filtered(1.0).train(1)
    with pytest.raises(ValueError, match="the saved budget"):
        other = filtered(2.0)
        load(other.engine, other, save(trained))
    with pytest.raises(ValueError, match="4 updates without a RenyiFilter"):
        other = filtered(1.0)
        load(other.engine, other, save(Training().train(1)))
    fresh = filtered(1.0)
    load(fresh.engine, fresh, save(Training()))  # no update was made before
    with pytest.warns(UserWarning, match="kept privacy budgets"):
        plain = Training()
        load(plain.engine, plain, save(trained))

"""Sweeps that joblib's workers share: the numbers of one process, in its order."""

import copy
import warnings
from pathlib import Path

import joblib
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.gradients import norm_sweep, sweep
from opacus_pi.gradients.joblib_workers import run_in_workers, runs_of_batches

from .cases import make
from .oracle import loop_norms

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")


class Counted(Dataset):
    """Counts the items that are read in this process."""

    def __init__(self, x, y):
        self.x, self.y, self.num_read = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.num_read += 1
        return self.x[index], self.y[index]


class Coupled(nn.Module):
    """Every output depends on the whole batch, and no rule fits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def require_same(found, alone):
    for name in ("grad_norms", "confidences", "errors", "correct"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name


@pytest.mark.parametrize("num_examples", [0, 1, 7, 64, 65, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("num_runs", [1, 2, 5, 100])
def test_runs_hold_whole_batches_in_order(num_examples, batch_size, num_runs):
    runs = runs_of_batches(num_examples, batch_size, num_runs)
    assert [i for run in runs for i in run] == list(range(num_examples))
    assert len(runs) == min(num_runs, -(-num_examples // batch_size))
    assert all(run.start % batch_size == 0 and len(run) for run in runs)
    lengths = [-(-len(run) // batch_size) for run in runs]
    assert not runs or max(lengths) - min(lengths) <= 1


@pytest.fixture(scope="module", params=["loky", "dask"])
def workers(request):
    """A context of joblib with two workers, each a process with one thread."""
    if request.param == "loky":
        with joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
            yield
        return
    distributed = pytest.importorskip("distributed")
    root = str(Path(__file__).parents[2])
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        yield


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mlp", "conv-mixed"])
def test_workers_give_the_numbers_of_one_process(workers, one_thread, name):
    model, x, y = make(name)
    data_set = Counted(x, y)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = sweep(model, CRITERION, data_set, batch_size=2)
    assert data_set.num_read == 0  # the workers read their copies
    assert torch.equal(torch.get_rng_state(), before)
    with joblib.parallel_config("sequential"):
        alone = sweep(model, CRITERION, data_set, batch_size=2)
    assert data_set.num_read == len(data_set)
    require_same(found, alone)
    expected = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(found.grad_norms, expected, rtol=1e-5, atol=0)


def test_a_model_in_private_training_can_be_measured(workers, one_thread):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    plain = copy.deepcopy(model)
    private, _, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    x, y = next(iter(loader))
    CRITERION(private(x), y).backward()
    norms = norm_sweep(private, CRITERION, data, batch_size=3)
    torch.testing.assert_close(
        norms, loop_norms(plain, LOSSES, *data.tensors), rtol=1e-5, atol=0
    )


def test_warnings_and_errors_of_workers_reach_the_caller(workers):
    data = [(torch.randn(3), k % 2) for k in range(8)]
    with pytest.warns(UserWarning, match="influence each other"):
        norm_sweep(Coupled(), CRITERION, data, batch_size=4)
    with pytest.raises(ValueError, match=r"a pair \(x, y\)"):
        norm_sweep(nn.Linear(3, 2), CRITERION, [torch.randn(3)] * 4, batch_size=2)


def test_a_warning_of_several_workers_is_given_once(workers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_in_workers(_doubled, [1, 2, 3]) == [2, 4, 6]
    assert [str(w.message) for w in caught] == ["doubled"]


def _doubled(value):
    warnings.warn("doubled", stacklevel=1)
    return 2 * value


def test_recorded_sweeps_stay_in_this_process(workers):
    """Their ``collate_fn`` reports to the chain of custody of this process."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    data = Counted(x, y)
    model = nn.Linear(3, 2)
    engine = PrivacyEngine(
        recorder=Recorder("swept", every=[1], criterion=CRITERION, batch_size=4)
    )
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=4, collate_fn=_backwards),
        noise_std=0.0,
        criterion=CRITERION,
        poisson_sampling=False,
    )
    for inputs, targets in loader:
        optimizer.zero_grad()
        CRITERION(model(inputs), targets).backward()
        optimizer.step()
    expected = loop_norms(model, LOSSES, x, y).float().numpy()
    assert engine.ledger.grad_norms[0] == pytest.approx(expected, rel=1e-5)


def _backwards(items):
    return torch.utils.data.default_collate(items[::-1])

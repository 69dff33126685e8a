"""Below complete attribution a warning names the cause and the remedy: every cause."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.attribution import causes
from opacus_pi.attribution.evidence import _are_values_moved
from opacus_pi.attribution.samples import DelayedChecksums
from opacus_pi.attribution.tracker import Tracker
from tests.attribution import loops, runs

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger", "ignore:PrivacyEngine detected new dataset"
)
FIXED = {"poisson": False}


def two_views(run):
    """Each sample twice, with noise."""
    for x, y in run.loader:
        views = x.repeat_interleave(2, 0) + torch.randn(2 * len(x), *x.shape[1:])
        run.step(views, y.repeat_interleave(2))


def transformed_beside(run):
    """Each batch is used for two updates: first transformed, then as it is."""
    for x, y in run.loader:
        run.step(x.exp(), y)
        run.step(x, y)


def permuted_or_transformed(run):
    for i, (x, y) in enumerate(run.loader):
        order = torch.arange(len(x)).flip(0)
        x, y = x[order], y[order]
        run.step(x.exp() if i % 2 else x, y)


LOOPS = {  # cause: a loop that has it, and what its warning must say
    causes.COMPUTED: (loops.transformed, "without verification.*collate_fn"),
    causes.UNTRACED: (loops.look_ahead_transformed, "several batches.*collate_fn"),
    causes.OTHER_SIZE: (two_views, "more or fewer samples.*one sample for each"),
    causes.BESIDE_BATCHES: (transformed_beside, "delivered batches beside such inputs"),
    causes.MOVED_AND_CHANGED: (permuted_or_transformed, "moved some samples to other"),
    causes.UNSEEN: (loops.inner_layers_only, "No forward pass.*Call the model itself"),
    causes.PASSES_DISAGREE: (loops.two_batches_in_one_loss, "Use one batch per loss"),
}


def alike(run):
    """Parts, copied, of a batch in which two examples have the same input."""
    for x, y in run.loader:
        order = torch.tensor([2, 0, 3])
        run.step(x[order], y[order])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*runs.tensors(), strict=True))

    def __len__(self):
        return runs.NUM_EXAMPLES


def twins():
    x, y = runs.tensors()
    x[0], y[0], y[1] = x[1], 0, 1
    return torch.utils.data.TensorDataset(x, y)


@pytest.mark.parametrize("cause", LOOPS, ids=lambda c: c.name)
def test_loops(cause):
    loop, message = LOOPS[cause]
    run = runs.Run(**FIXED)
    with pytest.warns(UserWarning, match=message):
        loop(run)
    check(run, cause)


def test_examples_that_are_alike():
    run = runs.Run(data_set=twins(), shuffle=False, **FIXED)
    with pytest.warns(
        UserWarning, match="1 samples .*equal in all entries.*that the data loader"
    ):
        alike(run)
    check(run, causes.ALIKE)
    assert run.engine.attribution["unattributed"] == 1


def test_examples_with_equal_inputs():
    run = runs.Run(data_set=twins(), shuffle=False, **FIXED)
    with pytest.warns(UserWarning, match="^Some examples of a batch have equal inputs"):
        for x, y in run.loader:
            run.step(x[[2, 1, 0, 3]], y[[2, 1, 0, 3]])
    assert set(run.engine._run.tracker.causes) == {causes.EQUAL_INPUTS.name}
    assert run.engine.attribution["unattributed"] == 0


def test_a_data_set_without_positions():
    loader = DataLoader(Stream(), batch_size=4)
    run = runs.Run(loader=loader, data_set=loader.dataset, **FIXED)
    with pytest.warns(UserWarning, match="no indices.*Use a map-style"):
        loops.plain(run)
    check(run, causes.NO_INDICES)


class OfFrames(nn.Module):
    """Gives its layer the frames of all examples as rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(runs.WIDTH, runs.CLASSES)

    def rows(self, x):
        return x.repeat_interleave(3, 0) + torch.arange(3).repeat(len(x))[:, None]

    def forward(self, x):
        return self.layer(self.rows(x)).unflatten(0, (len(x), 3)).mean(1)


class Mirrored(OfFrames):
    """Gives its layer the batch, and a copy of it in reverse."""

    def rows(self, x):
        return torch.cat([x, x.flip(1)])

    def forward(self, x):
        return sum(self.layer(self.rows(x)).chunk(2))


class OfSome(OfFrames):
    """Gives its layer every second example."""

    def rows(self, x):
        return x[::2]

    def forward(self, x):
        return torch.cat([self.layer(self.rows(x)), x[1::2, : runs.CLASSES]])


def trained_with(model, mode="hooks", *, accumulates=False, **options):
    engine = PrivacyEngine(recorder=Recorder(probe_model=False, **options))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*runs.tensors()), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for number, (x, y) in enumerate(loader):
        runs.criterion(model(x), y).backward()
        if number % 2 or not accumulates:
            optimizer.step()
            optimizer.zero_grad()
    return engine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [OfFrames, Mirrored])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_rows_that_the_model_makes_of_an_example_are_refused(model, mode, accumulates):
    engine = trained_with(
        model(), mode, accumulates=accumulates, unattributed="worst_case"
    )
    with pytest.raises(AccountingError, match="several rows of each example") as error:
        _ = engine.ledger
    assert "several batches" not in str(error.value)
    assert 'grad_sample_mode="fast"' in str(error.value)
    assert set(engine._run.tracker.causes) == {causes.ROWS_IN_MODEL.name}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [OfFrames, Mirrored])
def test_the_fast_mode_has_the_norms_of_examples_with_several_rows(model):
    torch.manual_seed(3)
    module = model()
    true = runs.true_norms(*runs.tensors(), copy.deepcopy(module))
    ledger = trained_with(module, "fast", every=range(1, 7)).ledger
    first = ledger.grad_norms[0, :4]  # later rows are at other weights
    np.testing.assert_allclose(first, true[:4], rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_fewer_rows_than_examples_are_of_examples_that_a_layer_was_not_given():
    tracker = trained_with(OfSome())._run.tracker
    assert set(tracker.causes) == {causes.MISMATCH.name}
    assert "only some of the examples" in causes.MISMATCH.explanation


def check(run, cause):
    counts = run.engine.attribution
    assert counts["by_storage"] + counts["by_content"] < sum(counts.values())
    tracker = run.engine._run.tracker
    assert set(tracker.causes) == {cause.name}
    assert tracker.explanation(cause.name) == cause.explanation
    uncertain = counts["by_latest"] + counts["unattributed"]
    assert tracker.causes[cause.name] == uncertain


def test_complete_attribution_says_nothing(recwarn):
    for loop in (loops.plain, loops.copied):
        loop(runs.Run(**FIXED))
    assert not [w for w in recwarn if "samples" in str(w.message).lower()]


# -------------------------------------------------- which batch an update was made of
def test_the_delivery_of_gradients():
    tracker, x, u = Tracker(), torch.randn(3, 4), torch.randn(2, 4)
    first = tracker.delivered([0, 1, 2], x)
    tracker.delivered([3, 4], u)
    assert tracker.delivery_of_gradients() is None
    one = tracker.bind([x])
    assert tracker.delivery_of_gradients() is None  # its backward pass has not run
    tracker.mark_backward(one)
    assert tracker.delivery_of_gradients() is first
    tracker.mark_backward(tracker.bind([u]))
    assert tracker.delivery_of_gradients() is None
    assert tracker.attribute([3, 2]).tolist() == [0, 1, 2, 3, 4]
    assert tracker.delivery_of_gradients() is None


def test_gradients_made_by_hand_are_matched_only_without_a_backward_pass():
    tracker, x = Tracker(), torch.randn(3, 4)
    tracker.delivered([5, 6, 7], x)
    tracker.bind_gradients(torch.randn(3, 2, 2))
    with pytest.warns(UserWarning, match="without verification"):
        assert tracker.attribute([3]).tolist() == [5, 6, 7]
    tracker.mark_backward(tracker.bind([x]))
    tracker.bind_gradients(torch.randn(3, 2, 2))
    assert tracker.attribute([3]).tolist() == [5, 6, 7]
    assert tracker.counts["by_storage"] == tracker.counts["by_latest"] == 3


@pytest.mark.parametrize("num_ids", [3, 40])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_ids_in_another_order(mode, num_ids):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (40,), generator=rng)
    ids = torch.arange(40) if num_ids == 40 else ids
    targets = torch.randint(0, 3, (40,), generator=rng)
    criterion = torch.nn.CrossEntropyLoss()
    model = torch.nn.Sequential(torch.nn.Embedding(num_ids, 4), torch.nn.Linear(4, 3))
    engine = PrivacyEngine()
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(
            torch.utils.data.TensorDataset(ids, targets), batch_size=10
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": criterion} if mode == "ghost" else {}),
    )
    model, optimizer, loader = parts[0], parts[1], parts[-1]
    criterion = parts[2] if mode == "ghost" else criterion
    for x, y in loader:
        order = y.argsort()
        optimizer.zero_grad()
        criterion(model(x[order]), y[order]).backward()
        optimizer.step()
    assert engine.attribution["unattributed"] == 40
    with pytest.raises(AccountingError, match="numbers of the delivered batch in oth"):
        _ = engine.ledger


def counted(batch, inputs):
    """Return how one batch that a model was given is attributed, and the causes."""
    tracker = Tracker()
    tracker.delivered([4, 2, 7], batch)
    tracker.mark_backward(tracker.bind(inputs))
    assert tracker.attribute([3]).tolist() == [4, 2, 7]
    return {k: num for k, num in tracker.counts.items() if num}, list(tracker.causes)


def test_copies_of_ids_are_recognised_where_they_differ():
    users, films = torch.tensor([5, 5, 3]), torch.tensor([1, 2, 2])
    batch, copies = (users, films), (users.int(), films.double())
    assert counted(batch, copies) == ({"by_content": 3}, [])
    with pytest.warns(UserWarning, match="several examples of a batch have equal ones"):
        found = counted(batch, copies[:1])
    assert found == ({"by_latest": 3}, [causes.EQUAL_NUMBERS.name])


@pytest.mark.parametrize(
    "change", [lambda x: x + 1, lambda x: 0 * x, lambda x: torch.stack([x, x], 1)]
)
def test_other_numbers_are_no_copies(change):
    batch = torch.tensor([5, 8, 3]), torch.zeros(3)
    with pytest.warns(UserWarning, match="neither the tensors .* nor copies of them"):
        found = counted(batch, change(batch[0]))
    assert found == ({"by_latest": 3}, [causes.COMPUTED.name])


def test_renamed_ids_are_no_other_order():
    before = torch.tensor([0, 1, 0, 1])
    delivered = DelayedChecksums(before, 0)
    latest = SimpleNamespace(all_contents=lambda: [delivered])
    renamed = DelayedChecksums(1 - before, 0)
    assert not _are_values_moved(renamed, latest)
    assert _are_values_moved(DelayedChecksums(before.sort().values, 0), latest)


def test_different_ids_with_the_same_values_have_moved():
    before = torch.tensor([3, 9, 4])
    latest = SimpleNamespace(all_contents=lambda: [DelayedChecksums(before, 0)])
    assert not _are_values_moved(DelayedChecksums(before.clone(), 0), latest)
    assert not _are_values_moved(DelayedChecksums(before + 1, 0), latest)
    assert _are_values_moved(DelayedChecksums(before.flip(0), 0), latest)

"""LightningModules that train privately, or monitored, with nothing changed in them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.gradients import norm_sweep
from tests.private_training import Log, one_at_a_time

pl = pytest.importorskip("lightning.pytorch")
from opacus_pi.integration.lightning import PrivacyCallback  # noqa: E402

CRITERION = nn.CrossEntropyLoss()
NUM_EXAMPLES = 24
PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Classifier(pl.LightningModule):
    """A user's module with one child; nothing in it refers to this library."""

    def __init__(self, calls_itself=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.calls_itself = calls_itself
        self.expected = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.expected += one_at_a_time(copy.deepcopy(self.plain()), x, y)
        loss = CRITERION(self(x) if self.calls_itself else self.net(x), y)
        self.log("loss", loss)
        return loss

    def plain(self):
        """The net as it is now, without hooks."""
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        net.load_state_dict(self.net.state_dict())
        return net

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(NUM_EXAMPLES, 4, generator=generator)
    return TensorDataset(x, torch.randint(3, (NUM_EXAMPLES,), generator=generator))


def loader(num_workers=0):
    return DataLoader(data(), batch_size=6, num_workers=num_workers)


def trainer(*callbacks, max_epochs=2, **options):
    silent = {"logger": False, "enable_progress_bar": False}
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, "enable_model_summary": False},
        **silent | options,
    )


def fit(engine, model=None, source=None, *, options=PRIVATE, **trainer_options):
    torch.manual_seed(0)
    model = Classifier() if model is None else model
    callback = PrivacyCallback(engine, **options)
    fitting = trainer(callback, **trainer_options)
    fitting.fit(model, loader() if source is None else source)
    return model, fitting


@pytest.mark.parametrize("calls_itself", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_norms_are_those_of_one_example_at_a_time(calls_itself, workers):
    engine = PrivacyEngine(accountant="rdp", recorder=Log())
    model, _ = fit(engine, Classifier(calls_itself), loader(workers))
    log, counts = engine.recorder, engine.attribution
    np.testing.assert_allclose([n for _, n in log.observed], model.expected, rtol=1e-5)
    assert counts["by_storage"] == len(log.observed) == sum(counts.values()) > 0
    assert log.ledger.mechanism.num_steps == len(log.updates) == 8
    assert {u["noise_std"] for u in log.updates} == {0.5}
    assert engine.accountant.history == [(1.0, 0.25, 8)]
    assert (engine.epsilons(1e-3) <= engine.get_epsilon(1e-3) + 1e-9).all()


def test_training_is_that_of_clipping_each_gradient_by_hand():
    quiet = PRIVATE | {"noise_multiplier": 0.0, "poisson_sampling": False}
    model, fitting = fit(PrivacyEngine(), options=quiet)
    torch.manual_seed(0)
    twin, total = Classifier().net, {}
    for epoch in range(2):
        for x, y in loader():
            for one, label in zip(x, y, strict=True):
                loss = CRITERION(twin(one[None]), label[None])
                grads = torch.autograd.grad(loss, list(twin.parameters()))
                norm = torch.cat([g.flatten() for g in grads]).norm()
                for p, g in zip(twin.parameters(), grads, strict=True):
                    total[p] = total.get(p, 0) + g * (0.5 / (norm + 1e-6)).clamp(max=1)
            with torch.no_grad():
                for p in twin.parameters():
                    p -= 0.2 * 0.5**epoch * total.pop(p) / 6
    ours, theirs = (
        nn.utils.parameters_to_vector(m.parameters()) for m in (model, twin)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert fitting.global_step == 8


@pytest.mark.parametrize("source", ["loader", "data module", "method"])
def test_wherever_the_data_come_from(source):
    engine, model = PrivacyEngine(), Classifier()
    if source == "method":
        model.train_dataloader = loader
    given = {"loader": loader(), "data module": Data(), "method": None}[source]
    torch.manual_seed(0)
    trainer(PrivacyCallback(engine, **PRIVATE)).fit(model, given)
    assert engine.ledger.num_examples == NUM_EXAMPLES


def test_the_model_is_a_plain_one_after_the_fit():
    model, _ = fit(PrivacyEngine())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    CRITERION(model.net(data()[:][0]), data()[:][1]).backward()


def test_hooks_are_removed_when_training_fails():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    model = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(PrivacyEngine(), model)
    assert not any(m._forward_hooks for m in model.modules())


def test_monitored_training():
    engine = PrivacyEngine(accountant="rdp")
    options = {"prepare": "make_monitored", "noise_std": 0.01, "criterion": CRITERION}
    model, _ = fit(engine, options=options)
    ledger = engine.ledger
    assert ledger.source == "swept" and ledger.mechanism.num_steps == 8
    norms = norm_sweep(model.net, CRITERION, data())
    np.testing.assert_allclose(ledger.grad_norms[-1], norms, rtol=1e-5)


def test_make_private_with_epsilon():
    engine = PrivacyEngine(accountant="rdp")
    wanted = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}
    options = {"prepare": "make_private_with_epsilon", "max_grad_norm": 1.0} | wanted
    fit(engine, options=options)
    assert engine.get_epsilon(1e-3) == pytest.approx(3.0, abs=0.1)


def test_lightnings_checkpoints_contain_record_and_accountant(tmp_path):
    engine = PrivacyEngine()
    _, first = fit(engine, max_epochs=1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = PrivacyEngine(recorder=Recorder())
    again = trainer(PrivacyCallback(resumed, **PRIVATE), max_epochs=2)
    again.fit(Classifier(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert again.global_step == 8 and resumed.ledger.mechanism.num_steps == 8
    assert sum(steps for *_, steps in resumed.accountant.history) == 8
    before = engine.ledger
    rows = resumed.ledger.grad_norms[: len(before.steps)]
    np.testing.assert_array_equal(rows, before.grad_norms)


def test_a_named_submodule_is_trained():
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    engine = PrivacyEngine()
    fit(engine, Two(), options=PRIVATE | {"module": "net"})
    assert engine.attribution["unattributed"] == 0 < engine.attribution["by_storage"]


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in self.net[::2]]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Classifier,
            {"accumulate_grad_batches": 2},
            "accumulate_grad_batches must .*got 2",
        ),
        (Classifier, {"gradient_clip_val": 1.0}, "gradient_clip_val must .*got 1.0"),
        (Classifier, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
        (Manual, {}, "automatic_optimization must .*got False"),
        (TwoOptimizers, {}, "optimizers"),
    ],
)
def test_settings_that_cannot_be_accounted_for_raise(model, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(PrivacyEngine(), model(), **options)


def test_other_refusals():
    with pytest.raises(ValueError, match="prepare must be one of .*, got 'fit'"):
        PrivacyCallback(PrivacyEngine(), prepare="fit")
    with pytest.raises(
        ValueError, match="train_dataloaders must be one torch .*, got list"
    ):
        fit(PrivacyEngine(), source=[loader(), loader()])
    with pytest.raises(ValueError, match="ghost.*criterion"):
        fit(PrivacyEngine(), options=PRIVATE | {"grad_sample_mode": "ghost"})


def test_without_lightning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("opacus_pi.integration.lightning.Callback", object)
    with pytest.raises(ImportError, match=r"lightning>=2"):
        PrivacyCallback(PrivacyEngine())

"""After an audit, labels that are ignored in a few batches only, and other criteria.

Each run audits its criterion on batches in which it is right. Norms are compared with
the gradients of single examples by autograd.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.attribution.delivery import Delivery, LoaderPass
from opacus_pi.custody import Chain
from opacus_pi.integration.ignored_labels import IgnoredLabels
from opacus_pi.models.known_losses import is_known_loss, label_mean_of
from opacus_pi.models.token_loss import TokenLoss

BATCH, NUM, CLASSES = 4, 64, 3
LATE = 61  # an example of the last batch, which is not drawn to be compared
MODES = ("hooks", "fast", "functorch", "ew")
IGNORED = "divides by the number of labels of the whole batch that are not ignored"


def labels_with(*ignored, label=-100, tokens=()):
    labels = torch.randint(
        0, CLASSES, (NUM, *tokens), generator=torch.Generator().manual_seed(2)
    )
    for place in ignored:
        labels[place] = label
    return labels


class Training:
    """A run over the batches in their order, audited at once."""

    def __init__(
        self, criterion, labels, *, mode="hooks", model=None, audit=True, **options
    ):
        torch.manual_seed(0)
        x = torch.randn(NUM, 5, generator=torch.Generator().manual_seed(1))
        self.x, self.labels, self.criterion = x, labels, criterion
        self.module = model or nn.Linear(5, CLASSES)
        self.plain = copy.deepcopy(self.module)
        self.engine = PrivacyEngine(recorder=Recorder(every=range(1, 40)))
        given = {"criterion": criterion} if mode == "ghost" else {}
        self.model, self.optimizer, *wrapped, self.loader = self.engine.make_private(
            module=self.module,
            optimizer=torch.optim.SGD(self.module.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(x, labels), batch_size=BATCH),
            noise_multiplier=0.1,
            max_grad_norm=1e3,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **given,
            **options,
        )
        self.used = wrapped[0] if wrapped else criterion
        self.true = []
        if audit:
            assert self.engine.audit(criterion).passed

    def keep_true_norms(self, own):
        """Keep the norm of each example's own gradient with the present weights.

        Args:
            own: ``(outputs, labels) -> losses``, one for each example.
        """
        self.plain.load_state_dict(self.module.state_dict())
        norms = []
        for x, label in zip(self.x, self.labels, strict=True):
            loss = own(self.plain(x[None]), label[None]).sum()
            found = torch.autograd.grad(loss, list(self.plain.parameters()))
            norms.append(float(torch.cat([g.flatten() for g in found]).norm()))
        self.true.append(norms)

    def train(self, loss=None, own=None):
        loss = loss or self.used
        for x, y in self.loader:
            if own is not None:
                self.keep_true_norms(own)
            self.optimizer.zero_grad()
            loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    @property
    def link(self):
        links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == "loss")

    def assert_right(self):
        """Compare all recorded norms with the true ones."""
        recorded, true = self.engine.ledger.grad_norms, np.array(self.true)
        seen = ~np.isnan(recorded)
        assert seen.any()
        np.testing.assert_allclose(recorded[seen], true[seen], rtol=1e-4, atol=1e-6)

    def assert_refused(self, reason=IGNORED):
        with pytest.raises(AccountingError, match=reason):
            _ = self.engine.ledger


class LogLinear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, CLASSES), nn.LogSoftmax(1))


class OfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, CLASSES * 2)

    def forward(self, x):
        return self.layer(x).unflatten(1, (CLASSES, 2))


DIVIDING = {
    "cross entropy": (nn.CrossEntropyLoss(), -100),
    "other index": (nn.CrossEntropyLoss(ignore_index=7), 7),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), -100),
    "function": (F.cross_entropy, -100),
    "partial": (functools.partial(F.cross_entropy, ignore_index=7), 7),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "hooks") for name in DIVIDING), *(("function", m) for m in MODES[1:])],
)
def test_one_ignored_label_late_in_the_run_is_refused(name, mode):
    criterion, label = DIVIDING[name]
    run = Training(criterion, labels_with(LATE, label=label), mode=mode)
    run.train().assert_refused()


@pytest.mark.filterwarnings("ignore")
def test_a_scheduled_factor_of_ignored_labels_is_refused():
    def of_schedule(outputs, targets):
        of_schedule.num_calls += 1
        return of_schedule.num_calls / 40 * run.criterion(outputs, targets)

    of_schedule.num_calls = 0
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE))
    run.train(of_schedule).assert_refused("has labels that the criterion ignores")
    of_schedule.num_calls = 0
    run = Training(nn.CrossEntropyLoss(), labels_with())
    assert run.train(of_schedule).link.state == "unchecked"
    assert "a factor that changes" in run.link.sentence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [nn.NLLLoss, lambda: F.nll_loss])
def test_the_negative_log_likelihood_ignores_labels_too(make):
    Training(make(), labels_with(LATE), model=LogLinear()).train().assert_refused()


@pytest.mark.filterwarnings("ignore")
def test_ignored_tokens_couple_only_if_examples_have_other_numbers_of_them():
    labels = labels_with(tokens=(2,))
    labels[:, 0] = -100  # of each example one
    run = Training(nn.CrossEntropyLoss(), labels, model=OfTokens())

    def own(outputs, targets):
        return F.cross_entropy(outputs, targets)

    assert run.train(own=own).link.state == "checked"
    run.assert_right()
    labels[:, 0] = 1
    labels[LATE, 1] = -100
    Training(nn.CrossEntropyLoss(), labels, model=OfTokens()).train().assert_refused()


def own_losses(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_a_sum_may_ignore_labels(mode, recwarn):
    run = Training(
        nn.CrossEntropyLoss(reduction="sum"),
        labels_with(LATE, 3),
        mode=mode,
        loss_reduction="sum",
    )
    assert run.train(own=own_losses).link.state == "checked"
    run.assert_right()
    assert not [w for w in recwarn if "without a check" in str(w.message)]


def test_ghost_clipping_takes_the_mean_over_all_examples(recwarn):
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE, 3), mode="ghost")
    assert run.train(own=own_losses).link.state == "checked"
    run.assert_right()
    assert not [w for w in recwarn if "without a check" in str(w.message)]


def test_a_loop_that_leaves_such_examples_out_is_right(recwarn):
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE, 5, 20))
    for x, y in run.loader:
        run.keep_true_norms(own_losses)
        labelled = y != -100
        run.optimizer.zero_grad()
        run.criterion(run.model(x[labelled]), y[labelled]).backward()
        run.optimizer.step()
    assert run.link.state == "checked"
    run.assert_right()
    assert not [w for w in recwarn if "without a check, that the loss" in str(w)]


@pytest.mark.filterwarnings("ignore")
def test_batches_that_are_fetched_ahead_are_compared_when_they_are_used():
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE - 8))
    waiting = []
    for batch in [*run.loader, None, None]:
        waiting.append(batch)
        if len(waiting) > 2:
            x, y = waiting.pop(0)
            run.optimizer.zero_grad()
            run.criterion(run.model(x), y).backward()
            run.optimizer.step()
    run.assert_refused()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [LATE, LATE + 1])
def test_parts_of_a_batch_divide_by_their_own_labels(place):
    run = Training(nn.CrossEntropyLoss(), labels_with(place))
    managed = BatchMemoryManager(
        data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer
    )
    with managed as run.loader:
        run.train()
    run.assert_refused()


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_are_all_compared():
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE))
    for number, (x, y) in enumerate(run.loader, 1):
        run.optimizer.signal_skip_step(number % 8 != 0)
        run.criterion(run.model(x), y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.assert_refused()


class Drawing(nn.Module):
    """Draws from a generator of its own, so that no copy repeats its outputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(5, CLASSES), [0]
        self.is_drawing = False

    def forward(self, x):
        self.calls[0] += self.is_drawing
        return self.layer(x) * (1 + self.calls[0])


def test_an_update_that_cannot_be_compared_is_said():
    run = Training(nn.CrossEntropyLoss(), labels_with(LATE), model=Drawing())
    run.module.calls = Endless()
    with pytest.warns(UserWarning, match="could not be compared with the criterion"):
        run.train()
    assert run.link.state == "unchecked"
    assert "ignore_index=-100" in run.link.sentence


class Endless(list):
    """A list whose first entry is another one at each reading, in copies too."""

    count = 0

    def __getitem__(self, _):
        Endless.count += 1
        return Endless.count

    def __setitem__(self, _, value):
        pass


@pytest.mark.parametrize("place", [0, LATE])
def test_a_batch_that_was_delivered_before_the_audit(place):
    run = Training(nn.CrossEntropyLoss(), labels_with(place), audit=False)
    for number, (x, y) in enumerate(run.loader):
        if number == 0:
            assert run.engine.audit(run.criterion).passed
        elif number == 12:
            break
        run.optimizer.zero_grad()
        run.criterion(run.model(x), y).backward()
        run.optimizer.step()
    if place == 0:  # the losses of one batch are divided by fewer labels
        with pytest.raises(AccountingError, match="divides by a quantity of the whole"):
            _ = run.link
    else:
        assert run.link.state == "checked"


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_looks_at_labels_again(tmp_path):
    path = tmp_path / "checkpoint"
    first = Training(nn.CrossEntropyLoss(), labels_with()).train()
    first.engine.save_checkpoint(
        path=path, module=first.model, optimizer=first.optimizer
    )
    later = Training(nn.CrossEntropyLoss(), labels_with(), audit=False)
    later.engine.load_checkpoint(
        path=path, module=later.model, optimizer=later.optimizer
    )
    assert later.engine.audit(later.criterion).passed
    later.labels[LATE] = -100
    torch.manual_seed(5)  # other noise than in the first part
    later.train().assert_refused()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [{"ignore_index": 1}, {"reduction": "sum"}])
def test_settings_that_change_after_the_audit_are_said(change):
    run = Training(nn.CrossEntropyLoss(), labels_with())
    for number, (x, y) in enumerate(run.loader):
        if number == 14:
            vars(run.criterion).update(change)
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    assert "settings of CrossEntropyLoss were changed" in run.link.sentence
    assert run.link.state == "unchecked"


def test_class_weights_are_refused_where_the_audited_batch_has_one_class():
    labels = torch.ones(NUM, dtype=torch.int64)
    labels[LATE] = 0
    weighted = nn.CrossEntropyLoss(torch.tensor([5.0, 1.0, 1.0]))
    run = Training(weighted, labels, audit=False)
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        assert not run.engine.audit(weighted).passed
    run.assert_refused("divides by the sum of the weights")


class Elsewhere(torch.Tensor):
    """A tensor that is not read before it is asked for, as on an accelerator."""

    is_cpu = False


@pytest.mark.parametrize("place", [LATE, None])
def test_labels_on_an_accelerator_are_read_with_the_chain(place):
    labels = labels_with(*([] if place is None else [place])).as_subclass(Elsewhere)
    criterion, chain = nn.CrossEntropyLoss(), Chain()
    chain.check("loss", "It was audited.")
    looks = IgnoredLabels(criterion, label_mean_of(criterion), chain)
    for start in range(0, NUM, BATCH):
        indices = list(range(start, start + BATCH))
        batch = (torch.zeros(BATCH, 5), labels[indices])
        assert not looks.saw(Delivery(indices, LoaderPass()), batch)
    if place is None:
        assert chain.is_checked("loss")
        return
    with pytest.warns(UserWarning, match="could not be compared with the criterion"):
        (link,) = (k for k in chain.custody().links if k.name == "loss")
    assert link.state == "unchecked"


# --------------------------------------------------- criteria that are not torch's own
def masked_mean(outputs, targets):
    losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    mask = (targets >= 0).float()
    return (losses * mask).sum() / mask.sum()


def hardest_of_a_mixed_batch(outputs, targets):
    losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return losses.topk(2).values.mean() if (targets < 0).any() else losses.mean()


class WithoutTheMasked(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        mask = targets >= 0
        if mask.all():
            return super().forward(outputs, targets)
        return super().forward(outputs[mask], targets[mask])


def changed_later(outputs, targets):
    weight = torch.tensor([1.0, 5.0, 9.0]) if (targets < 0).any() else None
    return F.cross_entropy(outputs, targets, weight=weight)


OWN = [masked_mean, hardest_of_a_mixed_batch, WithoutTheMasked(), changed_later]


@pytest.mark.parametrize("criterion", OWN, ids=lambda c: getattr(c, "__name__", "kind"))
def test_a_criterion_of_the_user_is_unchecked_in_between(criterion, recwarn):
    run = Training(criterion, labels_with(LATE)).train()
    assert run.link.state == "unchecked"
    assert "is not one of torch's losses" in run.link.sentence
    assert not [w for w in recwarn if "without a check, that the loss" in str(w)]


@pytest.mark.parametrize("is_own_first", [True, False])
def test_no_later_audit_covers_the_updates_of_another_criterion(is_own_first):
    criteria = [masked_mean, nn.CrossEntropyLoss()]
    run = Training(criteria[not is_own_first], labels_with()).train()
    assert run.engine.audit(criteria[is_own_first]).passed
    assert run.train(criteria[is_own_first]).link.state == "unchecked"


def test_which_criteria_are_known():
    hooked, replaced = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = masked_mean
    known = [
        *(nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), F.mse_loss, F.kl_div),
        *(functools.partial(F.nll_loss, ignore_index=0), TokenLoss()),
    ]
    own = [
        *(hooked, replaced, WithoutTheMasked(), masked_mean, F.softmax),
        *(functools.partial(F.mse_loss, size_average=False), lambda z, y: z.mean()),
        *(functools.partial(masked_mean), functools.partial(F.mse_loss, 1.0)),
    ]
    assert all(map(is_known_loss, known))
    assert not any(map(is_known_loss, own))

"""Loops that write the weights by themselves, or step the inner optimizer again."""

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine

NO_STEP = "did not step, and the weights were changed in another way"
AGAIN = "stepped again with the gradients of an update"
DIRECTLY = "stepped directly, and not with gradients of an update"
PUT_BACK = "put back"
LR = 0.1


class Loop:
    """A private training whose updates are made by a function of a test."""

    def __init__(self, mode="hooks", optimizer=torch.optim.SGD):
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
        self.engine = PrivacyEngine()
        self.model, self.optimizer, *middle, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=optimizer(self.net.parameters(), lr=LR),
            data_loader=DataLoader(data, batch_size=12),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
        )
        self.criterion = middle[0] if middle else F.cross_entropy
        self.num_updates = 0

    def backward(self, x, y):
        self.criterion(self.model(x), y).backward()

    def train(self, update, clears="first"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x, y in self.loader:
                if clears == "first":
                    self.optimizer.zero_grad()
                loss = self.criterion(self.model(x), y)
                if clears == "late":
                    self.optimizer.zero_grad()
                loss.backward()
                update(self)
                self.num_updates += 1
        return self

    def links(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {link.name: link for link in self.engine.ledger.custody.links}


def from_noised(loop):
    if loop.optimizer.pre_step():
        with torch.no_grad():
            for p in loop.optimizer.params:
                p -= LR * p.grad


def from_sums(loop):
    if loop.optimizer.pre_step():
        for p in loop.optimizer.params:
            p.data -= LR * p.summed_grad / 12


def and_step_last(update):
    return lambda loop: loop.optimizer.step() if loop.num_updates == 4 else update(loop)


def again(loop):
    loop.optimizer.step()
    loop.optimizer.original_optimizer.step()


def plain(loop):
    loop.optimizer.step()


# ------------------------------------------------------------------ updates by the loop
@pytest.mark.parametrize(
    ("mode", "clears"),
    [("hooks", "late"), ("functorch", "first"), ("ghost", "first"), ("fast", "late")],
)
def test_own_updates_from_noised_gradients_are_recorded(mode, clears):
    own = Loop(mode).train(from_noised, clears)
    opacus = Loop(mode).train(plain, clears)
    assert own.engine.ledger.mechanism == opacus.engine.ledger.mechanism
    assert own.engine.ledger.mechanism.num_steps == 5
    assert torch.allclose(own.net.weight, opacus.net.weight)
    weights = own.links()["weights"]
    assert weights.state == "unchecked"
    assert NO_STEP in weights.sentence
    assert "p.summed_grad" in weights.sentence
    assert opacus.links()["weights"].state == "checked"


@pytest.mark.parametrize("update", [from_noised, from_sums])
@pytest.mark.parametrize("clears", ["first", "late"])
def test_the_reason_is_true_if_the_last_update_is_made_by_step(update, clears):
    weights = Loop().train(and_step_last(update), clears).links()["weights"]
    assert weights.state == "unchecked"
    assert NO_STEP in weights.sentence
    assert PUT_BACK not in weights.sentence


@pytest.mark.parametrize("num", [0, 4])
def test_a_single_update_by_the_loop_is_found(num):
    def update(loop):
        (from_sums if loop.num_updates == num else plain)(loop)

    weights = Loop().train(update).links()["weights"]
    assert weights.state == "unchecked"
    assert NO_STEP in weights.sentence


def test_the_last_update_is_in_a_checkpoint(tmp_path):
    loop = Loop().train(from_noised)
    path = tmp_path / "checkpoint.pt"
    loop.engine.save_checkpoint(path=path, module=loop.model, optimizer=loop.optimizer)
    assert loop.engine.recorder.num_steps == 5
    assert loop.engine.recorder.ledger.mechanism.num_steps == 5


def test_an_update_that_the_loop_leaves_out_stays_checked():
    def skips(loop):
        if loop.optimizer.pre_step() and loop.num_updates != 2:
            loop.optimizer.original_optimizer.step()

    links = Loop().train(skips).links()
    assert links["weights"].state == links["noise"].state == "checked"


def test_other_weights_in_a_pass_are_still_said():
    loop = Loop()

    def moves(loop):
        from_noised(loop)
        loop.optimizer.zero_grad()
        kept = loop.net.weight.data
        loop.net.weight.data = kept + 1
        loop.backward(torch.randn(12, 4), torch.arange(12) % 3)
        loop.net.weight.data = kept
        loop.optimizer.step()

    with pytest.warns(UserWarning, match=PUT_BACK):
        for x, y in loop.loader:
            loop.optimizer.zero_grad()
            loop.backward(x, y)
            moves(loop)


def test_a_replaced_inner_optimizer_is_no_step_by_hand():
    loop = Loop()
    loop.optimizer.original_optimizer = torch.optim.Adam(loop.net.parameters())
    assert loop.train(plain).links()["weights"].state == "checked"


@pytest.mark.filterwarnings("ignore")
def test_the_ledger_says_that_the_last_update_has_no_step():
    loop = Loop().train(from_noised)
    engine = loop.engine
    del loop
    with pytest.raises(AccountingError, match="has not completed a step since") as told:
        _ = engine.ledger
    assert "Noise was drawn for update 5" in str(told.value)
    assert "keep the optimizer until you have read the ledger" in str(told.value)


# ------------------------------------------------------------------------- second steps
@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        ("hooks", torch.optim.SGD),
        ("functorch", torch.optim.Adam),
        ("ghost", torch.optim.Rprop),
        ("fast", torch.optim.SGD),
    ],
)
def test_a_second_step_with_noised_gradients_is_followed(mode, optimizer):
    loop = Loop(mode, optimizer).train(again)
    links = loop.links()
    assert links["noise"].state == "checked"
    assert links["weights"].state == "unchecked"
    assert AGAIN in links["weights"].sentence
    assert loop.engine.ledger.mechanism.num_steps == 5
    assert loop.engine.ledger.weights == "changed"


def test_a_second_step_after_pre_step():
    def twice(loop):
        if loop.optimizer.pre_step():
            loop.optimizer.original_optimizer.step()
            loop.optimizer.original_optimizer.step()

    assert AGAIN in Loop().train(twice).links()["weights"].sentence


def added_in_place(loop):
    for p in loop.optimizer.params:
        p.grad_sample = None
    loop.backward(torch.randn(12, 4), torch.arange(12) % 3)


def computed_anew(loop):
    loop.optimizer.zero_grad()
    added_in_place(loop)


def put_in_place(loop):
    for p in loop.optimizer.params:
        p.grad.copy_(p.summed_grad)


def put_instead(loop):
    for p in loop.optimizer.params:
        p.grad = p.summed_grad.clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change", [added_in_place, computed_anew, put_in_place, put_instead]
)
def test_a_second_step_with_other_gradients_is_refused(change):
    def update(loop):
        loop.optimizer.step()
        change(loop)
        loop.optimizer.original_optimizer.step()

    loop = Loop().train(update)
    with pytest.raises(AccountingError, match=DIRECTLY):
        loop.links()


@pytest.mark.filterwarnings("ignore")
def test_a_second_step_with_a_closure_is_refused():
    def update(loop):
        loop.optimizer.step()
        loop.optimizer.original_optimizer.step(lambda: torch.zeros(()))

    loop = Loop().train(update)
    with pytest.raises(AccountingError, match=DIRECTLY):
        loop.links()


def test_gradients_are_not_kept_for_a_second_step():
    loop = Loop().train(plain)
    gradient = weakref.ref(loop.net.weight.grad)
    loop.model.zero_grad(set_to_none=True)  # not by the optimizer
    assert gradient() is None

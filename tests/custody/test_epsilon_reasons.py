"""What get_epsilon says where there is no ledger: only what was established."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.custody import Chain
from opacus_pi.ledger.custody import Custody

NUM, BATCH = 48, 8
NOT_KNOWN = "It is not known whether it is a bound for this training. "
NO_BOUND = "cannot be taken as a bound for this training. "


def prepared(module=None, data=None, sampler=None, accountant="rdp", **options):
    torch.manual_seed(0)
    x, y = torch.randn(NUM, 4), torch.arange(NUM) % 3
    data = TensorDataset(x, y) if data is None else data
    model = nn.Sequential(nn.Linear(4, 3)) if module is None else module
    engine = PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH, sampler=sampler),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    return engine, *made


def train(model, optimizer, batches, call=None):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy((call or model)(x), y).backward()
        optimizer.step()


def layers_only():
    engine, model, optimizer, loader = prepared()
    train(model, optimizer, loader, call=model._module[0])
    return engine


def another_loader():
    engine, model, optimizer, _ = prepared()
    other = prepared()[-1]  # over equal data, also by Poisson sampling
    train(model, optimizer, other)
    return engine


def stepped_directly():
    engine, model, optimizer, loader = prepared()
    train(model, optimizer, loader)
    public = nn.functional.cross_entropy(model(torch.randn(9, 4)), torch.arange(9) % 3)
    optimizer.zero_grad()
    public.backward()
    optimizer.original_optimizer.step()
    return engine


def a_sampler_of_weights():
    sampler = WeightedRandomSampler([1.0] * NUM, NUM)
    engine, model, optimizer, loader = prepared(sampler=sampler, poisson_sampling=False)
    train(model, optimizer, loader)
    return engine


def a_method_of_its_own():
    engine, model, optimizer, loader = prepared()
    optimizer.clip_and_accumulate = optimizer.clip_and_accumulate
    train(model, optimizer, loader)
    return engine


def words(**options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, 9, (NUM, 5)), torch.arange(NUM) % 3)
    module = nn.Sequential(
        nn.Embedding(9, 4, **options), nn.Flatten(), nn.Linear(20, 3)
    )
    engine, model, optimizer, loader = prepared(module, data)
    train(model, optimizer, loader)
    return engine


def padded_words():
    return words(padding_idx=0)


def padded_words_in_ghost_clipping():
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, 9, (NUM, 5)), torch.arange(NUM) % 3)
    module = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten())
    module.append(nn.Linear(20, 3))
    engine, model, optimizer, criterion, loader = prepared(
        module, data, grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss()
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return engine


def rescaled_words():
    return words(max_norm=1.0)


def twice():
    engine, model, optimizer, loader = prepared()
    for batch in loader:
        train(model, optimizer, [batch, batch])
    return engine


def layers_only_and_twice():
    engine, model, optimizer, loader = prepared()
    train(model, optimizer, loader, call=model._module[0])
    for batch in loader:
        train(model, optimizer, [batch, batch])
    return engine


def directly_and_without_noise_of_its_size():
    engine, model, optimizer, loader = prepared()
    train(model, optimizer, loader)
    optimizer.original_optimizer.step()  # with noise: harmless
    optimizer.zero_grad()
    nn.functional.cross_entropy(
        model(torch.randn(9, 4)), torch.arange(9) % 3
    ).backward()
    optimizer.original_optimizer.step()
    for x, y in loader:
        seed = torch.initial_seed()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        torch.manual_seed(seed)  # the same noise in each update
        optimizer.step()
    return engine


ESTABLISHED = {
    layers_only: NOT_KNOWN,
    another_loader: NOT_KNOWN,
    stepped_directly: NOT_KNOWN,
    a_sampler_of_weights: NO_BOUND,  # with replacement: an example twice in a batch
    a_method_of_its_own: NOT_KNOWN,
    padded_words: NOT_KNOWN,
    padded_words_in_ghost_clipping: NO_BOUND,
    rescaled_words: NO_BOUND,
    twice: NO_BOUND,
    layers_only_and_twice: NO_BOUND,
    directly_and_without_noise_of_its_size: NO_BOUND,
}


@pytest.mark.parametrize(("loop", "words"), ESTABLISHED.items())
def test_get_epsilon_says_what_is_established(loop, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = loop()
    with pytest.raises(AccountingError):
        _ = engine.ledger
    with pytest.warns(UserWarning, match="returns Opacus's number") as said:
        engine.get_epsilon(1e-5)
    texts = [str(one.message) for one in said]
    assert any(words in text for text in texts), texts
    others = {NOT_KNOWN, NO_BOUND} - {words}
    assert not any(other in text for other in others for text in texts), texts


@pytest.mark.parametrize("hook", [None, lambda _: None])
def test_the_warning_is_printed_once_however_often_epsilon_is_asked_for(hook):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, model, optimizer, loader = prepared()
        if hook is not None:
            train(model, optimizer, loader)
            optimizer.attach_step_hook(hook)  # in place of the accountant's
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for x, y in loader:
            optimizer.zero_grad()
            call = model._module[0] if hook is None else model
            nn.functional.cross_entropy(call(x), y).backward()
            optimizer.step()
            engine.get_epsilon(1e-5)
    words = NOT_KNOWN if hook is None else "fewer updates than were made"
    assert sum(words in str(one.message) for one in said) == 1


def test_what_was_established_is_kept_with_a_saved_run():
    chain = Chain()
    chain.break_link("norm", "A method is another one.", rules_out_epsilon=False)
    chain.break_link("norm", "Another method, too.", rules_out_epsilon=False)
    assert chain.custody().epsilon_reason() == ("A method is another one.", False)
    saved = Custody.from_json(chain.custody().to_json())
    assert saved.epsilon_reason() == ("A method is another one.", False)
    resumed = Chain()
    resumed.resume(saved)
    assert resumed.custody().epsilon_reason() == saved.epsilon_reason()
    resumed.break_link("norm", "Nothing was clipped.")
    assert resumed.custody().epsilon_reason() == ("Nothing was clipped.", True)
    again = Custody.from_json(resumed.custody().to_json())
    assert again.epsilon_reason() == ("Nothing was clipped.", True)


def test_without_a_broken_link_nothing_is_known_against_epsilon():
    assert Custody().epsilon_reason() == ("", False)
    assert Custody(num_samples=1000, num_unattributed=9).epsilon_reason()[0] == ""


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_pass_of_the_loader_without_an_update_is_said(accountant):
    engine, _, _, loader = prepared(accountant=accountant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the PRV accountant
        warnings.simplefilter("error", UserWarning)
        assert engine.get_epsilon(1e-5) == 0
        next(iter(loader))
        assert engine.get_epsilon(1e-5) == 0
    other = nn.Linear(4, 3)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), loader)
    with pytest.warns(UserWarning, match="returned has made no update"):
        assert engine.get_epsilon(1e-5) == 0


def test_nothing_is_said_of_passes_before_the_first_update():
    engine, model, optimizer, loader = prepared()
    list(loader)
    train(model, optimizer, loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.get_epsilon(1e-5) > 0

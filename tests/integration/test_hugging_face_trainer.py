"""The Trainer of transformers with a callback: private, monitored, resumed, refused."""

import json
import warnings
from functools import partial

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine, Recorder, audit
from opacus_pi._errors import AccountingError
from opacus_pi.files.checksummed_state import verified_state, with_checksum
from opacus_pi.gradients import norm_sweep
from opacus_pi.integration.hugging_face import PrivacyCallback, TokenLoss
from tests.private_training import Log

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY, LENGTH, NUM_EXAMPLES = 20, 8, 48
PRIVATE = {"noise_multiplier": 0.8, "max_grad_norm": 0.5}
CRITERION = nn.CrossEntropyLoss()
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def config(**options):
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        **WITHOUT_DROPOUT,
        **options,
    )


def classifier():
    torch.manual_seed(0)
    return transformers.GPT2ForSequenceClassification(config(num_labels=2)).eval()


def language_model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config(loss_type="ForCausalLM"))


def sentences(token_labels=False, same_length=False):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(NUM_EXAMPLES):
        ids = torch.randint(2, VOCABULARY, (LENGTH,), generator=generator)
        mask = torch.arange(LENGTH) < (LENGTH if same_length else 3 + i % 5)
        labels = torch.where(mask, ids, -100) if token_labels else torch.tensor(i % 2)
        examples.append(
            {
                "input_ids": ids * mask,
                "attention_mask": mask.long(),
                "position_ids": torch.arange(LENGTH),
                "labels": labels,
            }
        )
    return examples


def trainer(
    model,
    data,
    callback,
    tmp_path,
    loss=None,
    optimizer=None,
    collate_fn=None,
    **arguments,
):
    settings = {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "epoch",
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), **settings | arguments),
        train_dataset=data,
        data_collator=collate_fn,
        callbacks=[callback],
        compute_loss_func=loss,
        optimizers=(optimizer, None),
    )


def train(model, data, tmp_path, engine=None, *, loss=None, options=PRIVATE, **rest):
    engine = engine or PrivacyEngine(accountant="rdp")
    callback = PrivacyCallback(engine, **options)
    trainer(model, data, callback, tmp_path, loss, **rest).train()
    return engine


def links(engine):
    return {link.name: link.state for link in engine.ledger.custody.links}


def own_norms(model, batch):
    norms = []
    for i in range(len(batch["labels"])):
        one = {name: rows[i : i + 1] for name, rows in batch.items()}
        grads = torch.autograd.grad(model(**one).loss, list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    return norms


def plain_opacus(callback):
    """A loop with Opacus alone, on the same seeds: its weights and all norms."""
    model = classifier().train()
    sampling, noise = callback._seeds(0)
    loader = DataLoader(sentences(), batch_size=12)
    loader.generator = torch.Generator().manual_seed(sampling)
    hooks, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_generator=torch.Generator().manual_seed(noise),
        wrap_model=False,
        **PRIVATE,
    )
    norms, reference = [], classifier().train()
    for _ in range(2):
        for batch in loader:
            reference.load_state_dict(model.state_dict())
            norms += own_norms(reference, batch)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    hooks.cleanup()
    return model, norms


def test_the_weights_are_those_of_opacus_and_the_norms_those_of_examples(tmp_path):
    model, engine = classifier(), PrivacyEngine(accountant="rdp", recorder=Log())
    # a trainer's own optimizer has the parameters in two groups, in another order
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = PRIVATE | {"seed": 3}
    train(model, sentences(), tmp_path, engine, options=options, optimizer=sgd)
    expected, norms = plain_opacus(PrivacyCallback(engine, seed=3))
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.state_dict()[name], parameter), name
    observed = [norm for _, norm in engine.recorder.observed]
    np.testing.assert_allclose(observed, norms, rtol=1e-5)
    assert engine.attribution["by_storage"] == len(norms) > 0
    assert not model._forward_hooks


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_with_a_criterion_every_link_is_checked(tmp_path, mode):
    options = PRIVATE | {"criterion": CRITERION, "grad_sample_mode": mode}
    engine = train(classifier(), sentences(), tmp_path, options=options)
    assert set(links(engine).values()) == {"checked"}
    assert engine.ledger.mechanism.num_steps == 8


def unpadded():
    """The sentences without padding, which ``padded`` adds."""
    return [
        {
            k: v[example["attention_mask"] > 0] if v.dim() else v
            for k, v in example.items()
        }
        for example in sentences()
    ]


def padded(items):
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {k: pad(v) if v[0].dim() else torch.stack(v) for k, v in columns.items()}


@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize("data,collate_fn", [(sentences, None), (unpadded, padded)])
@pytest.mark.parametrize("criterion", [CRITERION, None])
def test_rounding_of_half_precision_is_no_fault(
    tmp_path, mode, data, collate_fn, criterion
):
    options = PRIVATE | {"criterion": criterion, "grad_sample_mode": mode}
    rest = {"bf16": True, "collate_fn": collate_fn}
    engine = train(classifier(), data(), tmp_path, options=options, **rest)
    found = links(engine)
    assert found.pop("loss") == ("unchecked" if criterion is None else "checked")
    assert criterion is None or set(found.values()) == {"checked"}


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_fault_of_ten_percent_is_found_in_half_precision(tmp_path, factor):
    def loss(outputs, labels, num_items_in_batch=None):
        losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        return (losses * torch.where(labels == 0, factor, 1.0)).mean()

    options = PRIVATE | {"criterion": CRITERION}
    with pytest.raises(AccountingError, match="not those of the audited criterion|as"):
        train(
            classifier(), sentences(), tmp_path, loss=loss, options=options, bf16=True
        )


def test_without_a_seed_two_trainings_differ(tmp_path):
    models = [classifier(), classifier()]
    for model in models:
        train(model, sentences(), tmp_path, num_train_epochs=1)
    heads = [model.score.weight for model in models]
    assert not torch.equal(*heads)


def test_the_own_loss_of_a_model_is_looked_at(tmp_path):
    engine = train(classifier(), sentences(), tmp_path)
    link = next(link for link in engine.ledger.custody.links if link.name == "loss")
    assert link.state == "unchecked"
    assert "gave the loss of the batch" in link.sentence


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_a_loss_divided_by_the_tokens_of_a_batch_stops_the_training(tmp_path, mode):
    data, options = sentences(token_labels=True), PRIVATE | {"grad_sample_mode": mode}
    with pytest.raises(
        AccountingError, match=r"number of tokens.*TokenLoss\(shift=True\)"
    ):
        train(language_model(), data, tmp_path, options=options)


def test_sentences_of_one_length_have_losses_of_their_own(tmp_path):
    data = sentences(token_labels=True, same_length=True)
    engine = train(language_model(), data, tmp_path)
    assert links(engine)["loss"] == "unchecked"


def test_token_losses_are_accounted_for(tmp_path):
    loss, data = TokenLoss(shift=True), sentences(token_labels=True)
    options = PRIVATE | {"criterion": loss}
    engine = train(language_model(), data, tmp_path, loss=loss, options=options)
    assert set(links(engine).values()) == {"checked"}


@pytest.mark.parametrize(
    ("shift", "warns"), [(None, True), (False, False), (True, False)]
)
def test_a_causal_model_without_a_shift_is_said(tmp_path, shift, warns):
    loss, data = TokenLoss(shift=shift), sentences(token_labels=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(language_model(), data, tmp_path, loss=loss, num_train_epochs=1)
    found = [str(one.message) for one in caught]
    assert any("Use TokenLoss(shift=True)" in text for text in found) == warns


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_an_audit_says_that_the_labels_are_the_inputs(shift, copied):
    batch = torch.utils.data.default_collate(sentences(token_labels=True)[:4])
    if not copied:  # as if each label had been moved by hand, or were a tag
        batch["labels"] = torch.where(
            batch["labels"] == -100, -100, batch["input_ids"].roll(-1, 1)
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        audit(language_model(), TokenLoss(shift=shift), batch)
    found = [str(one.message) for one in caught]
    wanted = copied and not shift
    assert any("The labels are the input_ids" in text for text in found) == wanted


def test_a_wrong_criterion_stops_the_training(tmp_path):
    options = PRIVATE | {"criterion": nn.CrossEntropyLoss(label_smoothing=0.5)}
    with pytest.raises(AccountingError, match="not the one that was audited"):
        train(classifier(), sentences(), tmp_path, options=options)


def weighted(outputs, labels, num_items_in_batch=None):
    weights = torch.tensor([1.0, 3.0])
    return nn.functional.cross_entropy(outputs.logits, labels, weights)


def focal(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-losses).exp()) * losses).mean()


def test_a_weighted_loss_of_the_trainer_is_refused_without_a_criterion(tmp_path):
    with pytest.raises(AccountingError, match="by the sum of the class weights"):
        train(classifier(), sentences(), tmp_path, loss=weighted)


@pytest.mark.parametrize(
    "loss,criterion,warns",
    [(focal, None, True), (None, None, False), (focal, focal, False)],
)
def test_a_loss_that_nothing_looks_at_is_said(tmp_path, loss, criterion, warns):
    wrapped = None if criterion is None else lambda z, y: criterion(Outputs(z), y)
    options = PRIVATE | {"criterion": wrapped}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(classifier(), sentences(), tmp_path, loss=loss, options=options)
    found = [str(one.message) for one in caught]
    assert sum("PrivacyCallback was given no criterion" in text for text in found) == (
        warns
    )


class Outputs:
    def __init__(self, logits):
        self.logits = logits


def test_token_labels_need_a_token_loss(tmp_path):
    options = PRIVATE | {"criterion": CRITERION}
    with pytest.raises(ValueError, match=r"shape \(12, 8, 20\).*TokenLoss\(\)"):
        data = sentences(token_labels=True)
        train(language_model(), data, tmp_path, options=options)


def test_a_criterion_that_is_only_compared_is_to_be_trained_with(tmp_path):
    options, data = PRIVATE | {"criterion": TokenLoss(shift=True)}, sentences(True)
    with pytest.raises(AccountingError, match="compute_loss_func=...., too"):
        train(language_model(), data, tmp_path, options=options)


def test_a_target_epsilon_takes_the_epochs_of_the_trainer(tmp_path):
    options = {
        "prepare": "make_private_with_epsilon",
        "target_epsilon": 3.0,
        "target_delta": 1e-2,
        "max_grad_norm": 0.5,
    }
    engine = train(classifier(), sentences(), tmp_path, options=options)
    assert 2.5 < engine.get_epsilon(delta=1e-2) <= 3.01


def test_a_monitored_training(tmp_path):
    model = classifier()
    engine = PrivacyEngine(recorder=Recorder("swept", criterion=CRITERION))
    options = {"prepare": "make_monitored", "noise_std": 0.1, "criterion": CRITERION}
    train(model, sentences(), tmp_path, engine, options=options, max_grad_norm=0.0)
    ledger = engine.ledger
    assert ledger.steps[-1] == ledger.mechanism.num_steps == 8
    last = norm_sweep(model, CRITERION, sentences())
    np.testing.assert_allclose(ledger.grad_norms[-1], last, rtol=1e-5)
    assert set(links(engine).values()) == {"checked"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 2),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        train(classifier(), sentences(), tmp_path, **{name: value})


@pytest.mark.parametrize("seedable", [True, False])
def test_a_trainer_may_draw_each_example_once_an_epoch(tmp_path, seedable):
    engine = train(
        classifier(),
        sentences(),
        tmp_path,
        options=PRIVATE | {"poisson_sampling": False, "criterion": CRITERION},
        accelerator_config={"use_seedable_sampler": seedable},
    )
    assert set(links(engine).values()) == {"checked"}
    assert engine.ledger.mechanism.num_steps == 8


def test_a_trainer_that_groups_by_length_is_told_what_it_may_use(tmp_path):
    options = PRIVATE | {"poisson_sampling": False}
    with pytest.raises(AccountingError, match='strategy="random", its default, or "se'):
        train(
            classifier(),
            sentences(),
            tmp_path,
            options=options,
            train_sampling_strategy="group_by_length",
        )


def test_accumulation_names_what_else_saves_memory(tmp_path):
    with pytest.raises(ValueError, match='grad_sample_mode="fast".*BatchMemoryManager'):
        train(classifier(), sentences(), tmp_path, gradient_accumulation_steps=2)


def without_texts(items):
    kept = [{k: v for k, v in item.items() if k != "text"} for item in items]
    return torch.utils.data.default_collate(kept)


@pytest.mark.parametrize(
    ("collate_fn", "unused", "refused"),
    [(padded, False, True), (without_texts, False, False), (padded, True, False)],
)
def test_columns_of_texts_that_are_kept(tmp_path, collate_fn, unused, refused):
    data = [one | {"text": "a text"} for one in sentences()]
    rest = {"collate_fn": collate_fn, "remove_unused_columns": unused}
    if not refused:
        train(classifier(), data, tmp_path, num_train_epochs=1, **rest)
        return
    remedy = r"remove_columns\(\['text'\]\) as train_dataset"
    with pytest.raises(ValueError, match=f"remove_unused_columns must.*{remedy}"):
        train(classifier(), data, tmp_path, **rest)


def test_a_clipped_monitored_training_is_refused(tmp_path):
    options = {"prepare": "make_monitored", "noise_std": 0.1, "criterion": CRITERION}
    with pytest.raises(ValueError, match="max_grad_norm must be 0.0, got 1.0"):
        train(classifier(), sentences(), tmp_path, options=options)


CHECKPOINTS = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def test_gradient_checkpointing_is_refused_with_per_example_gradients(tmp_path):
    with pytest.raises(ValueError, match='False, got True.*grad_sample_mode="fast"'):
        train(classifier(), sentences(), tmp_path, **CHECKPOINTS)


def test_gradient_checkpointing_in_the_fast_mode_changes_no_norm(tmp_path):
    options, norms = PRIVATE | {"grad_sample_mode": "fast", "seed": 3}, []
    for arguments in ({}, CHECKPOINTS):
        engine = PrivacyEngine(recorder=Recorder(every=list(range(1, 9))))
        train(classifier(), sentences(), tmp_path, engine, options=options, **arguments)
        norms.append(engine.ledger.grad_norms)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def test_ghost_clipping_is_refused(tmp_path):
    options = PRIVATE | {"grad_sample_mode": "ghost", "criterion": CRITERION}
    with pytest.raises(ValueError, match="keeps the loss of the trainer"):
        train(classifier(), sentences(), tmp_path, options=options)


def test_a_resumed_training_has_the_ledger_of_both_parts(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "ignore_data_skip": True}
    engine = PrivacyEngine(accountant="rdp")
    callback = PrivacyCallback(engine, **PRIVATE)
    first = trainer(classifier(), sentences(), callback, tmp_path, **saving)
    first.train()
    assert engine.ledger.mechanism.num_steps == 8

    resumed = PrivacyEngine(accountant="rdp")
    callback = PrivacyCallback(resumed, **PRIVATE)
    again = trainer(classifier(), sentences(), callback, tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.ledger.mechanism.num_steps == 8
    assert resumed.get_epsilon(delta=1e-2) == engine.get_epsilon(delta=1e-2)
    steps = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert steps["global_step"] == 8

    (tmp_path / "checkpoint-3" / "privacy_engine.pt").unlink()
    third = trainer(classifier(), sentences(), callback, tmp_path, **saving)
    with pytest.raises(ValueError, match="has no privacy_engine.pt"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_trainer_resumes_its_optimizer_by_itself(tmp_path, optim):
    saving = {"save_strategy": "steps", "save_steps": 2, "ignore_data_skip": True}
    options = PRIVATE | {"criterion": CRITERION}
    run = {"optim": optim, "learning_rate": 1e-3, **saving}
    train(classifier(), sentences(), tmp_path, options=options, **run)
    path = tmp_path / "checkpoint-2"
    for is_changed in (False, True):
        engine = PrivacyEngine(accountant="rdp")
        callback = PrivacyCallback(engine, **options)
        again = trainer(classifier(), sentences(), callback, tmp_path, **run)
        if is_changed and optim != "sgd":  # that of later updates
            (path / "optimizer.pt").write_bytes(
                (tmp_path / "checkpoint-6" / "optimizer.pt").read_bytes()
            )
            again.train(resume_from_checkpoint=str(path))
            with pytest.raises(AccountingError, match="optimizer's state in the check"):
                _ = engine.ledger
            return
        again.train(resume_from_checkpoint=str(path))
        assert links(engine)["weights"] == "checked"


def test_a_checkpoint_that_does_not_know_the_optimizer_is_said(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "ignore_data_skip": True}
    run = {"optim": "adamw_torch", **saving}
    train(classifier(), sentences(), tmp_path, **run)
    path = tmp_path / "checkpoint-2" / "privacy_engine.pt"
    saved = torch.load(path)
    entries = verified_state(saved["opacus_pi"])
    del entries["optimizer_state"]
    saved["opacus_pi"] = with_checksum(entries)
    torch.save(saved, path)
    engine = PrivacyEngine(accountant="rdp")
    callback = PrivacyCallback(engine, **PRIVATE)
    again = trainer(classifier(), sentences(), callback, tmp_path, **run)
    again.train(resume_from_checkpoint=str(path.parent))
    assert links(engine)["weights"] == "unchecked"


def test_the_seeds_of_a_resumed_training_are_others():
    callback = PrivacyCallback(PrivacyEngine(), seed=1)
    assert callback._seeds(0) == PrivacyCallback(PrivacyEngine(), seed=1)._seeds(0)
    assert len({*callback._seeds(0), *callback._seeds(5)}) == 4


def test_data_sets_of_the_package_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {name: values.tolist() for name, values in example.items()}
        for example in sentences()
    ]
    data = datasets.Dataset.from_list([row | {"text": "unused"} for row in rows])
    engine = train(classifier(), data, tmp_path, options=PRIVATE | {"seed": 3})
    expected = train(classifier(), sentences(), tmp_path, options=PRIVATE | {"seed": 3})
    np.testing.assert_array_equal(engine.ledger.grad_norms, expected.ledger.grad_norms)
    assert engine.attribution["unattributed"] == 0

"""Models of transformers and peft through ``wrap_model=False``, on dict batches."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opacus_pi import FineTune, PrivacyEngine, Unlearner
from opacus_pi.gradients import norm_sweep
from tests.private_training import Log

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, NUM_EXAMPLES = 30, 8, 12
CRITERION = torch.nn.CrossEntropyLoss()
QUIET = {"vocab_size": VOCABULARY, "num_labels": 2, "pad_token_id": 0}


def bert():
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **QUIET,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
        **QUIET,
    )
    return transformers.GPT2ForSequenceClassification(config)


def lora():
    peft = pytest.importorskip("peft")
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "dense"]}
    model = peft.get_peft_model(bert(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: lora_A would have no gradient
            torch.nn.init.normal_(parameter)
    return model


MODELS = [bert, gpt2, lora]


def sentences():
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(NUM_EXAMPLES):
        ids = torch.randint(2, VOCABULARY, (LENGTH,), generator=generator)
        mask = torch.arange(LENGTH) < 4 + i % 5
        examples.append(
            {
                "input_ids": ids * mask,
                "attention_mask": mask.long(),
                "position_ids": torch.arange(LENGTH),
                "labels": torch.tensor(i % 2),
            }
        )
    return examples


def prepared(make, mode, data=None, **options):
    torch.manual_seed(0)
    model = make().train()
    engine = PrivacyEngine(accountant="rdp", recorder=Log())
    trained = [p for p in model.parameters() if p.requires_grad]
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=DataLoader(data or sentences(), batch_size=6),
        criterion=CRITERION,
        noise_multiplier=0.5,
        max_grad_norm=0.5,
        grad_sample_mode=mode,
        wrap_model=False,
        **options,
    )
    return model, engine, made


def own_norms(model, batch):
    norms = []
    for i in range(len(batch["labels"])):
        one = {name: rows[i : i + 1] for name, rows in batch.items()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(**one).loss, parameters, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
    return [float(norm) for norm in norms]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_norms_are_those_of_one_example_at_a_time(make, mode):
    assert_norms(make, mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_embeddings_may_be_frozen_instead_of_given_position_ids(mode):
    def without():
        return [drop(example, "position_ids") for example in sentences()]

    frozen = ["position"] if mode != "ghost" else ["position", "token_type"]
    assert_norms(lambda: freeze(bert(), *frozen), mode, without())
    assert_norms(lambda: freeze(gpt2(), "wpe"), mode, without())


@pytest.mark.filterwarnings(
    "ignore:There is no formula for the per-example gradients of"
)
@pytest.mark.parametrize(
    ("mode", "error", "match"),
    [
        ("hooks", RuntimeError, "stack expects each tensor to be equal size"),
        ("ghost", RuntimeError, "view size is not compatible"),
        ("fast", ValueError, "position_embeddings.weight cannot be computed.*own"),
    ],
)
def test_a_shared_position_embedding_is_refused(mode, error, match):
    data = [drop(example, "position_ids") for example in sentences()]
    with pytest.raises(error, match=match):
        assert_norms(bert, mode, data)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ("hooks", "'bert.embeddings.position_embeddings.weight' (1)"),
        ("functorch", "models of transformers make one row of position_ids if none"),
        ("ghost", "Put them into each example (token_type_ids="),
    ],
)
def test_an_audit_names_a_shared_position_embedding_and_the_remedy(mode, remedy):
    data = [drop(example, "position_ids") for example in sentences()]
    _, engine, _ = prepared(bert, mode, data=data)
    found = engine.audit(CRITERION)
    assert not found.passed and not found["norms"].passed
    text = found["norms"].sentence
    assert remedy in text and "position_ids=torch.arange(length)" in text
    assert "as the error says" not in text  # torch's error says nothing of the kind


def drop(example, name):
    return {key: value for key, value in example.items() if key != name}


def freeze(model, *names):
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)
    return model


def assert_norms(make, mode, data=None):
    model, engine, made = prepared(make, mode, data=data)
    optimizer, loader, expected = made[1], made[-1], []
    torch.manual_seed(0)
    plain = make().train()
    for batch in loader:
        plain.load_state_dict(model.state_dict())
        expected += own_norms(plain, batch)
        optimizer.zero_grad()
        if mode == "ghost":
            x = {name: rows for name, rows in batch.items() if name != "labels"}
            made[2](model(**x).logits, batch["labels"]).backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
    observed = [norm for _, norm in engine.recorder.observed]
    np.testing.assert_allclose(observed, expected, rtol=1e-5)
    assert engine.attribution["by_storage"] == len(expected) > 0
    assert sum(engine.attribution.values()) == len(expected)


@pytest.mark.parametrize("make", MODELS)
def test_sweeps_of_dicts(make):
    torch.manual_seed(0)
    model, batch = make().eval(), next(iter(DataLoader(sentences(), NUM_EXAMPLES)))
    found = norm_sweep(model, CRITERION, sentences())
    np.testing.assert_allclose(found, own_norms(model, batch), rtol=1e-5)


@pytest.mark.parametrize("make", [bert, lora])
def test_unlearning_from_dicts(make):
    model, engine, (hooks, optimizer, loader) = prepared(make, "hooks")
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    hooks.cleanup()
    before = copy.deepcopy(model.state_dict())
    unlearner = Unlearner(engine, criterion=CRITERION, method=FineTune())
    assert unlearner.plan([1, 4]).num_retain == NUM_EXAMPLES - 2
    result = unlearner.unlearn(sentences(), [1, 4], num_epochs=1, batch_size=5)
    assert isinstance(result.model, type(model))
    for name, parameter in result.model.named_parameters():
        frozen = torch.equal(parameter, before[name])
        assert frozen or parameter.requires_grad, name
    assert any(
        not torch.equal(v, before[k]) for k, v in result.model.state_dict().items()
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

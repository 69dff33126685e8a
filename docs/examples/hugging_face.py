"""A Hugging Face classifier: private training on dict batches, then unlearning.

A tiny BERT with random weights (nothing is downloaded) learns to tell two kinds of
sentences apart. ``wrap_model=False`` leaves the model unwrapped, so that
``model(**batch).loss``, ``generate``, ``save_pretrained`` and type checks work.

    pip install transformers   # and this package, from a checkout
    python docs/examples/hugging_face.py
"""

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import BertConfig, BertForSequenceClassification

from opacus_pi import Langevin, PrivacyEngine, Unlearner
from opacus_pi.evaluation import accuracy, predict
from opacus_pi.forget_sets import top_k

NUM_EXAMPLES, LENGTH, VOCABULARY = 1024, 12, 40
DELTA = 1e-3
CRITERION = torch.nn.CrossEntropyLoss()


class Sentences(Dataset):
    """Sentences of token ids, in which each label prefers one half of the vocabulary.

    Five percent of the labels are wrong. A batch has what a tokenizer returns, and
    ``position_ids`` with one row for each example. Without them the model would create
    one row for the whole batch, and there would be no per-example gradients of its
    position embedding.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = NUM_EXAMPLES, LENGTH
        self.labels = torch.arange(NUM_EXAMPLES) % 2
        own_half = torch.rand(shape, generator=generator) < 0.85
        half = torch.where(own_half, self.labels[:, None], 1 - self.labels[:, None])
        size = (VOCABULARY - 1) // 2
        self.ids = 1 + half * size + torch.randint(size, shape, generator=generator)
        wrong = torch.rand(NUM_EXAMPLES, generator=generator) < 0.05
        self.labels = torch.where(wrong, 1 - self.labels, self.labels)
        self.lengths = torch.randint(
            6, LENGTH + 1, (NUM_EXAMPLES,), generator=generator
        )

    def __len__(self) -> int:
        """The number of sentences."""
        return NUM_EXAMPLES

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """One sentence; the default collate_fn combines such dicts into a batch."""
        mask = torch.arange(LENGTH) < self.lengths[i]
        return {
            "input_ids": self.ids[i] * mask,
            "attention_mask": mask.long(),
            "position_ids": torch.arange(LENGTH),
            "labels": self.labels[i],
        }


def tiny_bert() -> BertForSequenceClassification:
    """A BERT of one layer with random weights."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def main() -> None:
    """Train, print the privacy losses, and unlearn the ten most expensive sentences."""
    torch.manual_seed(0)
    data_set, model = Sentences(), tiny_bert()
    engine = PrivacyEngine(accountant="rdp")
    hooks, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        data_loader=DataLoader(data_set, batch_size=128),
        noise_multiplier=0.7,
        max_grad_norm=5.0,
        wrap_model=False,
    )
    for _ in range(12):
        for batch in loader:  # the loop in the documentation of transformers
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    hooks.cleanup()

    trained = predict(model, data_set, CRITERION)
    epsilons = engine.epsilons(delta=DELTA)
    print(f"training accuracy {accuracy(trained.correct):.2f}")
    print(f"epsilon for any example {engine.get_epsilon(delta=DELTA):.2f}")
    print(
        f"epsilon per example, estimated: {epsilons.min():.2f} to {epsilons.max():.2f}"
    )
    print(f"samples attributed: {engine.attribution}")

    forget = top_k(engine.privacy_losses(order=8), 10)
    unlearner = Unlearner(
        engine,
        criterion=CRITERION,
        method=Langevin(noise_std=0.001),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )
    print(unlearner.plan(forget))
    result = unlearner.unlearn(data_set, forget, num_epochs=1, batch_size=128)
    part = Subset(data_set, forget.tolist())
    for name, one in [("before", model), ("after", result.model)]:
        confidence = predict(one, part, CRITERION).confidences.mean()
        print(f"mean confidence on the forget set, {name}: {confidence:.2f}")
    print(f"{result.guarantee.kind} guarantee for {result.guarantee.method}")


if __name__ == "__main__":
    main()

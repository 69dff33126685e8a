"""The ``Trainer`` of Hugging Face with one more callback, then unlearning.

The classifier and its sentences are those of ``hugging_face.py``: a tiny BERT with
random weights (nothing is downloaded).

    pip install transformers accelerate   # and this package, from a checkout
    python docs/examples/trainer.py
"""

import tempfile

from hugging_face import CRITERION, DELTA, Sentences, tiny_bert
from transformers import Trainer, TrainingArguments, set_seed

from opacus_pi import FineTune, PrivacyEngine, Unlearner
from opacus_pi.evaluation import accuracy, predict
from opacus_pi.forget_sets import top_k
from opacus_pi.integration.hugging_face import PrivacyCallback


def main() -> None:
    """Train, print the privacy losses, and unlearn the ten most expensive sentences."""
    set_seed(0)
    data_set, model = Sentences(), tiny_bert()
    engine = PrivacyEngine(accountant="rdp")
    private = PrivacyCallback(
        engine, noise_multiplier=0.7, max_grad_norm=5.0, criterion=CRITERION
    )
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=128,  # the expected size: batches are random
        num_train_epochs=12,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data_set, callbacks=[private]).train()

    correct = predict(model, data_set, CRITERION).correct
    epsilons = engine.epsilons(delta=DELTA)
    print(f"training accuracy {accuracy(correct):.2f}")
    print(f"epsilon for any example {engine.get_epsilon(delta=DELTA):.2f}")
    print(
        f"epsilon per example, estimated: {epsilons.min():.2f} to {epsilons.max():.2f}"
    )
    print(f"samples attributed: {engine.attribution}")

    forget = top_k(engine.privacy_losses(order=8), 10)
    unlearner = Unlearner(engine, criterion=CRITERION, method=FineTune())
    print(unlearner.plan(forget))
    result = unlearner.unlearn(data_set, forget, num_epochs=1, batch_size=128)
    print(f"{result.guarantee.kind} guarantee for {result.guarantee.method}")


if __name__ == "__main__":
    main()

"""LoRA with peft: private training of the adapters on a frozen base, then unlearning.

Only the adapters and the classifier are trained, so only their per-example gradients
are formed and clipped, and only they are unlearned. The base is a tiny BERT with random
weights (nothing is downloaded).

    pip install transformers peft   # and this package, from a checkout
    python docs/examples/lora.py
"""

import torch
from hugging_face import CRITERION, DELTA, Sentences, tiny_bert
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader

from opacus_pi import FineTune, PrivacyEngine, Unlearner
from opacus_pi.evaluation import accuracy, predict
from opacus_pi.forget_sets import top_k


def main() -> None:
    """Train the adapters, and unlearn the ten most expensive sentences."""
    torch.manual_seed(0)
    data_set = Sentences()
    adapters = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=4,
        lora_alpha=16,
        target_modules=["query", "key", "value", "dense"],
    )
    model = get_peft_model(tiny_bert(), adapters).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    engine = PrivacyEngine(accountant="rdp")
    hooks, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        data_loader=DataLoader(data_set, batch_size=128),
        noise_multiplier=0.7,
        max_grad_norm=5.0,
        wrap_model=False,
    )
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    hooks.cleanup()

    weights, of_all = sum(p.numel() for p in trained), model.num_parameters()
    epsilons = engine.epsilons(delta=DELTA)
    print(f"{weights} of {of_all} weights are trained")
    correct = predict(model, data_set, CRITERION).correct
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
    after = dict(result.model.named_parameters())
    untouched = all(torch.equal(after[name], p) for name, p in frozen.items())
    print(f"the base has not changed: {untouched}")
    print(f"{result.guarantee.kind} guarantee for {result.guarantee.method}")


if __name__ == "__main__":
    main()

"""Train a LightningModule with differential privacy, then monitored, without changes.

pip install "lightning>=2.6", and this package from a checkout
python docs/examples/lightning_module.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import FineTune, PrivacyEngine, Unlearner
from opacus_pi.evaluation import accuracy, predict
from opacus_pi.forget_sets import top_k
from opacus_pi.integration.lightning import PrivacyCallback

CRITERION = nn.CrossEntropyLoss()
DELTA = 1e-4


class Digits(LightningModule):
    """A classifier of handwritten digits; nothing in it refers to opacus_pi."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        x, y = batch
        return CRITERION(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(data_set: TensorDataset, callback: PrivacyCallback) -> Digits:
    """Train with a Lightning trainer; only the callback is new."""
    torch.manual_seed(0)
    model = Digits()
    trainer = Trainer(
        max_epochs=4,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data_set, batch_size=64))
    return model


def main() -> None:
    """Train twice, and unlearn ten examples of the private training."""
    images, labels = load_digits(return_X_y=True)
    data_set = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))

    engine = PrivacyEngine(accountant="rdp")
    model = fit(data_set, PrivacyCallback(engine, noise_multiplier=1, max_grad_norm=4))
    correct = predict(model, data_set, CRITERION).correct
    epsilons = engine.epsilons(delta=DELTA)
    print(f"private: training accuracy {accuracy(correct):.2f}")
    print(f"epsilon for any example {engine.get_epsilon(delta=DELTA):.2f}")
    print(
        f"epsilon per example, estimated: {epsilons.min():.2f} to {epsilons.max():.2f}"
    )
    print(f"samples attributed: {engine.attribution}")
    forget = top_k(engine.privacy_losses(order=8), 10)
    unlearner = Unlearner(engine, criterion=CRITERION, method=FineTune())
    print(unlearner.plan(forget))
    result = unlearner.unlearn(data_set, forget, num_epochs=2)
    print(f"{result.guarantee.kind} guarantee for {result.guarantee.method}")

    monitored = PrivacyEngine(accountant="rdp")
    model = fit(
        data_set,
        PrivacyCallback(
            monitored, prepare="make_monitored", noise_std=0.01, criterion=CRITERION
        ),
    )
    correct = predict(model, data_set, CRITERION).correct
    losses = monitored.privacy_losses(order=8)
    print(f"monitored: training accuracy {accuracy(correct):.2f}")
    print(f"Rényi losses of order 8: {losses.min():.3g} to {losses.max():.3g}")


if __name__ == "__main__":
    main()

"""A tiny private training through the installed package, from outside the checkout."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi

torch.manual_seed(0)
inputs, labels = torch.randn(48, 5), torch.arange(48) % 2
loader = DataLoader(TensorDataset(inputs, labels), batch_size=16)
model = torch.nn.Linear(5, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = opacus_pi.PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=optimizer,
    data_loader=loader,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)
for _ in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

epsilons = engine.epsilons(delta=1e-5)
bound = engine.get_epsilon(delta=1e-5)
if epsilons.shape != (48,) or not np.all((epsilons >= 0) & (epsilons <= bound)):
    sys.exit(f"Expected 48 epsilons in [0, {bound}], got {epsilons}.")
print(f"{Path(opacus_pi.__file__).parent}: epsilon at most {epsilons.max():.3f}")

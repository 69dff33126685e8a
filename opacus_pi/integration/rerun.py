"""Train the rest of a recorded run again, without some of its examples.

The loop goes on from a saved state to the update at which the recorded run ended. Each
update has the noise, the clip norm, the denominator and the learning rates that were
recorded; the noise is drawn anew. Under Poisson sampling the batches are drawn anew
from the examples that stay, which is independent of what was drawn before. Under fixed
sampling the recorded batches are used again, without the examples that are forgotten.

*What it does not know:* what else the training loop did. Pass ``update`` if it did more
than one backward pass of the mean loss.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from opacus_pi._validate import expect, require
from opacus_pi.integration.held_weights import held_by
from opacus_pi.ledger.participation_record import ParticipationRecord
from opacus_pi.models.batches import forward, inputs_and_targets, size_of, to_device
from opacus_pi.models.collating import Collating
from opacus_pi.models.module_list import difference, module_list

__all__ = ["Rerun", "require_architecture", "require_repeatable"]

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Update = Callable[[nn.Module, Optimizer, Any], None]
_FLAT = ("DPOptimizer", "DPOptimizerFastGradientClipping")
_SAME_MODEL = "Pass a model of the architecture that was trained."


@dataclass
class Rerun:
    """Everything that is needed to train the rest of a run again.

    Args:
        model: A plain module, trained in place.
        criterion: ``criterion(outputs, targets)``, one loss per example.
        train_set: The data set of the run.
        record: Its participations and settings.
        state: The saved state to go on from.
        forget: int64, the examples that are left out.
        generator: For batches and seeds; its seed must not be that of the run.
        update: ``update(model, optimizer, batch)`` makes one update; None: one backward
            pass of the mean loss.
        make_optimizer: ``params -> Optimizer``; None: the class of torch that the run
            used. Settings and state are those of the run in any case.
        collate_fn: Makes a batch of a list of items; None: torch's.
        max_batch_size: Examples of a physical batch at most. Larger batches of a
            private run are clipped in parts.
    """

    model: nn.Module
    criterion: Callable[[Any, Any], torch.Tensor]
    train_set: Dataset[Any]
    record: ParticipationRecord
    state: Mapping[str, Any]
    forget: NDArray[np.int64]
    generator: torch.Generator
    update: Update | None = None
    make_optimizer: MakeOptimizer | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    max_batch_size: int = 1024

    def run(self) -> Iterator[int]:
        """Make one update after another, and return control after each.

        Yields:
            Updates of the whole run that are done: from the state's number plus 1 to T.

        Raises:
            ValueError: If the model or the optimizer is not that of the run.
        """
        plain = self._restored_optimizer()
        is_private = "expected_batch_size" in self.state["settings"]
        model, optimizer = self._private(plain) if is_private else (self.model, plain)
        try:
            for step in range(self.state["num_steps"] + 1, self.record.num_steps + 1):
                self._set_learning_rates(plain, step)
                batch = self._drawn(step)
                with torch.random.fork_rng():  # dropout and noise are drawn from it
                    torch.manual_seed(self._new_seed())
                    if isinstance(optimizer, DPOptimizer):
                        self._private_update(model, optimizer, batch, step)
                    else:
                        self._plain_update(model, optimizer, batch, step)
                yield step
        finally:
            if isinstance(model, GradSampleModule):
                model.remove_hooks()
            _without_gradients(self.model)

    # ---------------------------------------------------------------------- preparation
    def _restored_optimizer(self) -> Optimizer:
        """Load the state into the model, and return an optimizer in its state."""
        require_architecture(self.model, self.state)
        self.model.load_state_dict(self.state["model"])
        modules = dict(self.model.named_modules())
        self.model.train()
        for name in self.state["evaluating"]:
            if name in modules:
                modules[name].training = False
        parameters = dict(self.model.named_parameters())
        names = self.state["parameters"]
        trained = {name for group in names for name in group}
        trained -= set(self.state.get("frozen", ()))  # absent in older states
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        groups = [{"params": [parameters[n] for n in group]} for group in names]
        optimizer = self._new_optimizer(groups)
        optimizer.load_state_dict(self.state["optimizer"])
        return optimizer

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return an optimizer of the class that the run used."""
        name: str = self.state["optimizer_class"]
        if self.make_optimizer is not None:
            made = self.make_optimizer([p for g in groups for p in g["params"]])
            found = f"{type(made).__module__}.{type(made).__qualname__}"
            expect(
                found == name,
                "optimizer",
                found,
                f"must be of the class that trained the model, {name}",
                "Pass the optimizer of the training to Unlearner(optimizer=...).",
            )
            defaults = made.defaults
            return type(made)(groups, **_accepted(type(made), defaults))
        module, _, attribute = name.rpartition(".")
        expect(
            module.startswith("torch.optim."),
            "optimizer",
            None,
            f"must be given, because the run used {name}, which is not torch's",
            "Pass Unlearner(optimizer=lambda params: ...).",
        )
        made_class: type[Optimizer] = getattr(
            importlib.import_module(module), attribute
        )
        rate: dict[str, Any] = {"lr": 1.0} if attribute == "SGD" else {}
        return made_class(groups, **rate)

    def _private(self, plain: Optimizer) -> tuple[nn.Module, DPOptimizer]:
        """Return model and optimizer as Opacus prepares them, with the run's settings.

        Args:
            plain: The optimizer of the run.
        """
        settings = self.state["settings"]
        optimizer = DPOptimizer(
            plain,
            noise_multiplier=0.0,  # set before each update
            max_grad_norm=1.0,
            expected_batch_size=settings["expected_batch_size"],
            loss_reduction=settings["loss_reduction"],
        )
        reduction = settings["loss_reduction"]
        return GradSampleModule(self.model, loss_reduction=reduction), optimizer

    # -------------------------------------------------------------------------- updates
    def _new_seed(self) -> int:
        """Return a seed for the global generators of one update."""
        return int(torch.randint(2**62, (), generator=self.generator))

    def _drawn(self, step: int) -> NDArray[np.int64]:
        """Return the examples of one update.

        Args:
            step: The update, from 1.
        """
        record = self.record
        if record.sampling != "poisson":
            batch = record.batch(step).astype(np.int64)
            return batch[~np.isin(batch, self.forget)]
        draws = torch.rand(record.num_examples, generator=self.generator)
        drawn = np.flatnonzero((draws < record.sample_rate).numpy())
        return drawn[~np.isin(drawn, self.forget)]

    def _set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rates that an update was recorded with."""
        if self.record.learning_rates is not None:
            rates = self.record.learning_rates[step - 1]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = float(rate)

    def _private_update(
        self,
        model: nn.Module,
        optimizer: DPOptimizer,
        batch: NDArray[np.int64],
        step: int,
    ) -> None:
        """Make one update with clipping and fresh noise."""
        clip = float(self.record.max_grad_norm[step - 1])
        optimizer.max_grad_norm = clip
        optimizer.noise_multiplier = float(self.record.noise_std[step - 1]) / clip
        optimizer.zero_grad()
        if not len(batch):
            for p in optimizer.params:
                p.grad_sample = torch.zeros(0, *p.shape, dtype=p.dtype, device=p.device)
            optimizer.step()
            return
        if self.update is not None:
            self.update(model, optimizer, self._items(batch))
            return
        starts = range(0, len(batch), self.max_batch_size)
        for start in starts:
            part = batch[start : start + self.max_batch_size]
            optimizer.signal_skip_step(do_skip=start != starts[-1])
            optimizer.zero_grad()
            self._loss(model, self._items(part)).backward()
            optimizer.step()

    def _plain_update(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batch: NDArray[np.int64],
        step: int,
    ) -> None:
        """Make one update on the mean gradient, with noise if the run had it."""
        noise_std = float(self.record.noise_std[step - 1])
        if noise_std:
            noise_std /= float(self.state["settings"]["mean_batch_size"])
        handle = optimizer.register_step_pre_hook(
            lambda *_: self._add_noise(optimizer, noise_std)
        )
        try:
            if self.update is not None and len(batch):
                self.update(model, optimizer, self._items(batch))
                return
            optimizer.zero_grad()
            if len(batch):
                self._loss(model, self._items(batch)).backward()
            else:
                for p in held_by(optimizer):
                    p.grad = torch.zeros_like(p)
            optimizer.step()
        finally:
            handle.remove()

    def _add_noise(self, optimizer: Optimizer, noise_std: float) -> None:
        """Add noise to every gradient just before the step."""
        if not noise_std:
            return
        for p in held_by(optimizer):
            if p.grad is not None:
                p.grad += noise_std * torch.randn_like(p.grad)

    def _loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, reduced as the run reduced it."""
        x, y = inputs_and_targets(batch)
        losses = self.criterion(forward(model, x), y)
        is_sum = self.state["settings"].get("loss_reduction") == "sum"
        return losses.sum() if is_sum else losses.mean()

    def _items(self, batch: NDArray[np.int64]) -> Any:
        """Return a batch of the data set, on the model's device."""
        data = self.train_set
        if self.collate_fn is None and type(data) is TensorDataset:
            found: Any = data[torch.from_numpy(batch)]
        else:
            found = Collating(self.collate_fn)([data[int(i)] for i in batch])
        return to_device(found, next(self.model.parameters()).device)


def require_repeatable(
    record: ParticipationRecord, state: Mapping[str, Any], train_set: Dataset[Any]
) -> None:
    """Refuse a run whose updates after a state cannot be made again.

    Args:
        record: The run's participations and settings.
        state: The state to go on from.
        train_set: The data set that is given now.

    Raises:
        ValueError: With what the run did and what can be done.
    """
    expect(
        size_of(train_set) == record.num_examples,
        "train_set",
        f"{size_of(train_set)} examples",
        f"must be the data set of the run, with {record.num_examples} examples",
        "Pass the data set that was trained on: in another one the same positions are "
        "other examples.",
    )
    require_flat_clipping(state)
    after = slice(state["num_steps"], None)
    expect(
        bool((record.sample_rates[after] <= record.sample_rate * (1 + 1e-9)).all()),
        "checkpoints",
        "a run that accumulated the gradients of several batches",
        "must be of a run with one batch for each update",
        "Train with one larger batch for each update; BatchMemoryManager splits it to "
        "save memory.",
    )
    require(
        record.sampling == "poisson" or not record.num_unattributed[after].any(),
        f"{int(record.num_unattributed[after].sum())} samples of the batches that are "
        "used again could not be matched to examples.",
        "Train again with inputs that are transformed in the data set, or with "
        "Poisson sampling.",
    )


def require_flat_clipping(state: Mapping[str, Any]) -> None:
    """Refuse a private run whose clip norm is not the same for all gradients.

    Adaptive clipping also releases how many gradients were clipped. That is neither
    repeated here, nor charged by the norm of the gradient alone.

    Args:
        state: Any state of the run.

    Raises:
        ValueError: If it did not clip each gradient as a whole, at a given clip norm.
    """
    clipping = state["settings"]["clipping"]
    is_private = "expected_batch_size" in state["settings"]
    expect(
        not is_private or clipping in _FLAT,
        "checkpoints",
        f"a run with {clipping}",
        "must be of a run with flat clipping at a given clip norm",
        'Train with clipping="flat".',
    )


def require_architecture(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a model that does not have the tensors and modules of a run's model.

    Args:
        model: A plain module; the values of its tensors do not count.
        state: The state from which the training is repeated. Those of earlier releases
            do not say which modules the model had.

    Raises:
        ValueError: If a tensor is missing or has another shape, or a module is of
            another type or has other settings.
    """
    found = _first_difference(model.state_dict(), state["model"])
    require(
        not found,
        f"model: its tensors are not those of the saved state: {found}.",
        _SAME_MODEL,
    )
    listed = state.get("modules")
    differs = difference(listed, module_list(model)) if isinstance(listed, str) else ""
    require(
        not differs,
        f"model: its modules are not those of the saved state ({differs}).",
        _SAME_MODEL,
    )


def _first_difference(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Return how many tensors of a model differ from saved ones, and one of them.

    Args:
        own: The model's state dict.
        saved: The saved one.
    """
    names = [*dict.fromkeys([*saved, *own])]
    shapes = [[_shape(state.get(name)) for state in (own, saved)] for name in names]
    odd = [(name, *s) for name, s in zip(names, shapes, strict=True) if s[0] != s[1]]
    if not odd:
        return ""
    (name, here, there), number = odd[0], len(odd)
    return f"{number} of {len(names)} differ, such as {name} ({here}, saved {there})"


def _shape(value: Any) -> str:
    """Return the shape of a tensor as text; "missing" if there is none."""
    return "missing" if value is None else str(tuple(getattr(value, "shape", ())))


def _accepted(kind: type[Optimizer], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that an optimizer's constructor takes by name."""
    code = kind.__init__.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {name: value for name, value in defaults.items() if name in names}


def _without_gradients(model: nn.Module) -> None:
    """Free the gradients, also those of single examples."""
    for parameter in model.parameters():
        parameter.grad = None
        for name in ("grad_sample", "summed_grad"):
            if hasattr(parameter, name):
                delattr(parameter, name)

"""Train a LightningModule as it is, with differential privacy or monitored.

    engine = PrivacyEngine()
    private = PrivacyCallback(engine, noise_multiplier=1.0, max_grad_norm=1.0)
    Trainer(callbacks=[private]).fit(model, train_loader)
    engine.epsilons(delta=1e-5)

Install the extra ``lightning`` to use it.

How it works: when ``Trainer.fit`` begins, the optimizer and the data loader exist, but
no batch has been drawn. At this point the callback has the engine prepare them, and
gives the trainer the prepared ones. The model itself is not wrapped, so that Lightning
finds the module that it expects.

This is the only file that knows Lightning. It uses one private name of it, seen in
Lightning 2.6: ``_data_source`` of the fit loop, from which the trainer takes its
training data.
"""

import io
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from opacus_pi._validate import expect
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.trainers import (
    require_preparation,
    require_setting,
    require_three,
)

__all__ = ["PrivacyCallback"]

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # PrivacyCallback raises when it is created
    Callback = object  # type: ignore[assignment,misc]


class PrivacyCallback(Callback):
    """Has an engine prepare model, optimizer and loader when ``Trainer.fit`` begins.

    ``training_step`` and ``configure_optimizers`` do not change; schedulers go on with
    the optimizer that they were created for. Lightning's checkpoints contain the ledger
    and the accountant, but no random states. After the fit the model has no hooks.

    Args:
        engine: The engine, which holds the ledger afterwards. Use one for each run.
        prepare: The method of the engine that prepares the run: ``"make_private"``,
            ``"make_private_with_epsilon"`` or ``"make_monitored"``.
        module: Name of the submodule to train. ``training_step`` must call this
            submodule itself. Default: the only child with trainable parameters; if
            there is not exactly one, the LightningModule, which ``training_step`` must
            then call as ``self(x)``.
        **options: Arguments of that method (``noise_multiplier``, ``noise_std``,
            ``poisson_sampling`` ...), without module, optimizer and data loader.

    Raises:
        ImportError: If lightning is not installed.
        ValueError: If ``prepare`` is not one of the three. ``Trainer.fit`` raises it if
            the trainer does something that cannot be accounted for (several optimizers
            or devices, accumulated or clipped gradients, manual optimization).
    """

    def __init__(
        self,
        engine: PrivacyEngine,
        *,
        prepare: str = "make_private",
        module: str | None = None,
        **options: Any,
    ) -> None:
        if Callback is object:
            raise ImportError(
                "PrivacyCallback needs lightning, which is not installed. Run: pip "
                "install 'lightning>=2.6'"
            )
        super().__init__()
        require_preparation(prepare)
        self.engine, self.prepare, self.module = engine, prepare, module
        self.options = options
        self._hooks: AbstractGradSampleHooks | None = None
        self._closure_handle: RemovableHandle | None = None
        self._loaded: torch.Tensor | None = None  # a checkpoint, as bytes

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Prepare what the trainer has set up, and give it the prepared objects.

        Args:
            trainer: The trainer, whose optimizer and training data are replaced.
            pl_module: The user's module.

        Raises:
            ValueError: If the run cannot be prepared or accounted for.
        """
        _check_trainer(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        is_private = self.prepare != "make_monitored"
        if not is_private:
            # Registered before the engine's hook, which adds noise to the gradients.
            self._closure_handle = optimizer.register_step_pre_hook(_run_closure_first)
        prepared = getattr(self.engine, self.prepare)(
            module=self._trained_module(pl_module),
            optimizer=optimizer,
            data_loader=_training_loader(trainer),
            **self.options,
            **({"wrap_model": False} if is_private else {}),
        )
        require_three(prepared, self.options.get("grad_sample_mode"))
        hooks, trainer.optimizers, loader = prepared[0], [prepared[1]], prepared[2]
        self._hooks = hooks if is_private else None
        _replace_training_loader(trainer, loader)
        if self._loaded is not None:
            with io.BytesIO(self._loaded.numpy().tobytes()) as file:
                self.engine.load_checkpoint(path=file, module=nn.Identity())

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Remove the hooks from model and optimizer.

        Args:
            trainer: The trainer; not used.
            pl_module: The user's module; not used.
        """
        if self._hooks is not None:
            self._hooks.cleanup()
        if self._closure_handle is not None:
            self._closure_handle.remove()
        self._hooks = self._closure_handle = None

    def on_exception(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        exception: BaseException,
    ) -> None:
        """Remove the hooks from model and optimizer when training fails.

        Args:
            trainer: The trainer; not used.
            pl_module: The user's module; not used.
            exception: The error; not used.
        """
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's checkpoint, for Lightning to save with its own.

        The checkpoint has no weights, because Lightning saves them itself.

        Returns:
            The bytes of the checkpoint as a uint8 tensor, under ``"engine"``.
        """
        with io.BytesIO() as file:
            self.engine.save_checkpoint(path=file, module=nn.Identity())
            saved = np.frombuffer(file.getvalue(), dtype=np.uint8).copy()
        return {"engine": torch.from_numpy(saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep an engine's checkpoint until the run is prepared.

        Args:
            state_dict: A dict returned by ``state_dict()``.
        """
        self._loaded = state_dict["engine"]

    def _trained_module(self, pl_module: "LightningModule") -> nn.Module:
        """Return the module whose forward passes and gradients are to be recorded."""
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        trained = [
            child
            for child in pl_module.children()
            if any(p.requires_grad for p in child.parameters())
        ]
        own = any(p.requires_grad for p in pl_module.parameters(recurse=False))
        return trained[0] if len(trained) == 1 and not own else pl_module


def _run_closure_first(
    optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Compute the gradients before noise is added to them.

    Lightning runs forward and backward pass in a closure, which an optimizer calls
    within ``step``, after all pre-hooks. This pre-hook calls it instead.

    Returns:
        The arguments of ``step`` without the closure.
    """
    closure = options.pop("closure", None)
    if closure is not None:
        closure()
    return args, options


def _check_trainer(trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Raise if an update would not be one optimizer's step on one batch.

    Raises:
        ValueError: If a setting must be changed; the message names it.
    """
    one_batch = "so that each update uses one batch"
    require_setting(
        "automatic_optimization",
        pl_module.automatic_optimization,
        equals=True,
        remedy=f"Set it to True, {one_batch}, or write your own training loop.",
    )
    require_setting(
        "num_optimizers",
        len(trainer.optimizers),
        equals=1,
        remedy="Return a single optimizer from configure_optimizers.",
    )
    require_setting(
        "num_devices", trainer.world_size, equals=1, remedy="Use Trainer(devices=1)."
    )
    require_setting(
        "accumulate_grad_batches",
        trainer.accumulate_grad_batches,
        equals=1,
        remedy=f"Use a larger batch_size instead, {one_batch}.",
    )
    require_setting(
        "gradient_clip_val",
        trainer.gradient_clip_val or 0,
        equals=0,
        remedy=(
            "Leave it out of the Trainer: the engine already clips the gradient of "
            "each example."
        ),
    )
    require_setting(
        "reload_dataloaders_every_n_epochs",
        vars(trainer)["reload_dataloaders_every_n_epochs"],
        equals=0,
        remedy=(
            "Leave it out of the Trainer: all epochs must use the data loader that the "
            "engine prepared."
        ),
    )


def _training_loader(trainer: "Trainer") -> DataLoader[Any]:
    """Return the loader that the trainer will train from.

    Raises:
        ValueError: If the training data do not come from one torch loader.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    expect(
        isinstance(loader, DataLoader),
        "train_dataloaders",
        type(loader).__name__,
        "must be one torch DataLoader",
        "Put all training data into one data set (torch.utils.data.ConcatDataset).",
    )
    return cast(DataLoader[Any], loader)


def _replace_training_loader(trainer: "Trainer", loader: DataLoader[Any]) -> None:
    """Have the trainer train from a loader, wherever its data came from before.

    The source of a trainer's data is a loader, or a module and the name of a method of
    it; it becomes the loader.
    """
    loop = trainer.fit_loop
    loop._data_source = replace(loop._data_source, instance=loader, name="")

"""Train a LightningModule as it is, with differential privacy or monitored.

    engine = PrivacyEngine()
    private = PrivacyCallback(engine, noise_multiplier=1.0, max_grad_norm=1.0)
    Trainer(callbacks=[private]).fit(model, train_loader)
    engine.epsilons(delta=1e-5)

Needs the extra ``lightning``.
"""

import io
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

__all__ = ["PrivacyCallback"]

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
except ImportError:  # the extra is not installed: said when it is used
    Callback = object  # type: ignore[assignment,misc]

_PREPARATIONS = ("make_private", "make_private_with_epsilon", "make_monitored")


class PrivacyCallback(Callback):
    """Prepares model, optimizer and loader by an engine when ``Trainer.fit`` begins.

    ``training_step`` and ``configure_optimizers`` stay as they are; schedulers go on
    with the optimizer they were made for. The ledger and the accountant are part of
    Lightning's checkpoints (random states are not). After the fit the model is a plain
    one again.

    Args:
        engine: Holds the ledger afterwards; one engine for each run.
        prepare: What is called: ``"make_private"``, ``"make_private_with_epsilon"`` or
            ``"make_monitored"``.
        module: Name of the submodule to train so, which ``training_step`` must call
            itself. Default: the only child with trainable parameters, else the
            LightningModule, which ``training_step`` must then call, as ``self(x)``.
        **options: Of the method of the engine (``noise_multiplier``, ``noise_std``,
            ``poisson_sampling`` ...), but for module, optimizer and loader.

    Raises:
        ImportError: If lightning is not installed.
        ValueError: If ``prepare`` is none of the three; from ``Trainer.fit``, if the
            trainer does what cannot be accounted (several optimizers or devices,
            accumulated or clipped gradients, manual optimization).
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
                "PrivacyCallback needs lightning: pip install opacus-pi[lightning]"
            )
        super().__init__()
        expect(
            prepare in _PREPARATIONS,
            "prepare",
            repr(prepare),
            f"must be one of {_PREPARATIONS}",
            "It is the method of the engine to call.",
        )
        self.engine, self.prepare, self.module = engine, prepare, module
        self.options = options
        self._hooks: AbstractGradSampleHooks | None = None
        self._handle: RemovableHandle | None = None
        self._saved: torch.Tensor | None = None

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Prepare what the trainer has set up, and have it use what came out."""
        _check_trainer(trainer, pl_module)
        fit = trainer.fit_loop
        is_private = self.prepare != "make_monitored"
        if not is_private:
            self._handle = trainer.optimizers[0].register_step_pre_hook(_closure_first)
        made = getattr(self.engine, self.prepare)(
            module=self._part(pl_module),
            optimizer=trainer.optimizers[0],
            data_loader=_only_loader(fit._data_source.dataloader()),
            **self.options,
            **({"wrap_model": False} if is_private else {}),
        )
        expect(
            len(made) == 3,
            "grad_sample_mode",
            repr(self.options.get("grad_sample_mode")),
            "must leave the criterion as training_step has it",
            'Use "hooks": ghost clipping takes its own criterion in two passes.',
        )
        self._hooks = made[0] if is_private else None
        trainer.optimizers = [made[1]]
        fit._data_source = _DataLoaderSource(made[2], "")
        if self._saved is not None:
            load: Any = self.engine.load_checkpoint
            with io.BytesIO(self._saved.numpy().tobytes()) as file:
                load(path=file, module=nn.Identity())

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Take the hooks off model and optimizer."""
        if self._hooks is not None:
            self._hooks.cleanup()
        if self._handle is not None:
            self._handle.remove()
        self._hooks = self._handle = None

    def on_exception(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        exception: BaseException,
    ) -> None:
        """Take the hooks off model and optimizer."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The engine's checkpoint, without the weights, which Lightning saves."""
        save: Any = self.engine.save_checkpoint
        with io.BytesIO() as file:
            save(path=file, module=nn.Identity())
            saved = np.frombuffer(file.getvalue(), dtype=np.uint8).copy()
        return {"engine": torch.from_numpy(saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the engine's checkpoint until the run is prepared."""
        self._saved = state_dict["engine"]

    def _part(self, pl_module: "LightningModule") -> nn.Module:
        """The module whose forward passes and gradients are those of the training."""
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        trained = [
            child
            for child in pl_module.children()
            if any(p.requires_grad for p in child.parameters())
        ]
        own = any(p.requires_grad for p in pl_module.parameters(recurse=False))
        return trained[0] if len(trained) == 1 and not own else pl_module


def _closure_first(
    optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook that has the gradients there before noise is added to them."""
    closure = options.pop("closure", None)
    if closure is not None:
        closure()
    return args, options


def _check_trainer(trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Refuse what a trainer does that makes an update something else."""
    optimizers, clip = len(trainer.optimizers), trainer.gradient_clip_val
    every = vars(trainer)["reload_dataloaders_every_n_epochs"]
    automatic, step = pl_module.automatic_optimization, "so that an update is one batch"
    for name, got, wanted, requirement, remedy in [
        (
            "automatic_optimization",
            automatic,
            True,
            f"must be True, {step}",
            "Call the engine in your own loop.",
        ),
        ("num_optimizers", optimizers, 1, "must be 1", "Train one by one."),
        ("num_devices", trainer.world_size, 1, "must be 1", "Use devices=1."),
        (
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            1,
            f"must be 1, {step}",
            "Use a larger batch_size.",
        ),
        (
            "gradient_clip_val",
            clip or 0,
            0,
            "must be 0",
            "The engine clips each example.",
        ),
        (
            "reload_dataloaders_every_n_epochs",
            every,
            0,
            "must be 0",
            "Keep the loader.",
        ),
    ]:
        expect(got == wanted, name, got, requirement, remedy)


def _only_loader(loader: Any) -> DataLoader[Any]:
    """The training data, if they come from one torch loader."""
    expect(
        isinstance(loader, DataLoader),
        "train_dataloaders",
        type(loader).__name__,
        "must be one torch DataLoader",
        "Every update has to draw from one data set.",
    )
    return cast(DataLoader[Any], loader)

"""Train with the ``Trainer`` of Hugging Face, with differential privacy or monitored.

    engine = PrivacyEngine()
    private = PrivacyCallback(engine, noise_multiplier=1.0, max_grad_norm=1.0)
    Trainer(model, arguments, train_dataset=data, callbacks=[private]).train()
    engine.epsilons(delta=1e-5)

How it works: when training begins, the trainer has made its optimizer and its data
loader, but has drawn no batch. Both are wrappers of Accelerate. The callback has the
engine prepare what they wrap, and gives the wrappers the prepared optimizer and loader.
The model stays the same object, so that ``save_pretrained`` and ``generate`` work.

Two things are different from a loop with Opacus. A ``Trainer`` seeds every random
generator with a number that is 42 if you do not choose it, and whoever knows it can
subtract the noise; so batches and noise are drawn from generators of the callback. And
a ``Trainer`` does not clear gradients of single examples: the callback does.

This is the only file that knows transformers. It uses no private name of it, and two
attributes of Accelerate's wrappers: ``AcceleratedOptimizer.optimizer`` and
``DataLoaderShard.base_dataloader``, seen in Accelerate 1.15 with transformers 5.24.
"""

import secrets
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect, require
from opacus_pi.integration.audited_run import Examples
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.trainers import (
    require_preparation,
    require_setting,
    require_three,
)
from opacus_pi.models.collating import COLLATE_ERRORS, columns_of_text
from opacus_pi.models.token_loss import TokenLoss

__all__ = ["PrivacyCallback", "TokenLoss"]

try:
    from transformers import TrainerCallback
except ImportError:  # PrivacyCallback raises when it is created
    TrainerCallback = object  # type: ignore[assignment,misc]

_FILE = "privacy_engine.pt"
_NUM_FIRST = 3  # updates after which a run that is refused is stopped at once
_ONE_PROCESS = (
    "Write a loop of your own for several processes: wrap the model in "
    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel."
)
_ONE_BATCH = (
    "Use a larger per_device_train_batch_size, so that each update uses one batch of "
    'the loader. If it does not fit into memory: grad_sample_mode="fast" keeps no '
    "per-example gradients, and allows gradient_checkpointing=True; or train in a loop "
    "of your own with Opacus's BatchMemoryManager, which accumulates exactly."
)
_NOT_SEEN = (
    "The trainer computes the loss outside of the model, with compute_loss_func or a "
    "compute_loss of its own, and PrivacyCallback was given no criterion. Every number "
    "assumes that each example has a loss of its own, which was not checked. Pass the "
    "same loss as PrivacyCallback(criterion=...), called as criterion(logits, labels)."
)
_COMPARED = (
    "PrivacyCallback(criterion=...) is only compared with the loss that the trainer "
    "uses: the one that the model returns, or that of compute_loss_func. To train with "
    "the criterion, pass it as Trainer(compute_loss_func=...), too."
)
_DRAWN = (
    "A Trainer draws each example once an epoch with "
    'train_sampling_strategy="random", its default, or "sequential".'
)
_SETTINGS: dict[str, tuple[Any, str]] = {
    "world_size": (1, _ONE_PROCESS),
    "gradient_accumulation_steps": (1, _ONE_BATCH),
    "fp16": (False, "Use bf16=True: a scaled loss changes the norms of the gradients."),
    "torch_compile": (False, "Leave it out: per-example gradients need hooks."),
    "auto_find_batch_size": (False, "Choose per_device_train_batch_size yourself."),
    "label_smoothing_factor": (
        0.0,
        "Pass compute_loss_func=..., a mean of one smoothed loss for each example.",
    ),
}


class PrivacyCallback(TrainerCallback):
    """Has an engine prepare model, optimizer and loader when ``Trainer.train`` begins.

    Model, data set, collator and arguments of the trainer do not change.
    ``per_device_train_batch_size`` is about the expected size of a batch: the number of
    examples, divided by the number of batches in an epoch. The trainer's own
    ``max_grad_norm`` has no effect on a private training: gradients of single examples
    are clipped at the ``max_grad_norm`` of the callback. Checkpoints of the trainer get
    a file with the ledger and the accountant.

    Args:
        engine: The engine, which holds the ledger afterwards. Use one for each run.
        prepare: The method of the engine that prepares the run: ``"make_private"``,
            ``"make_private_with_epsilon"`` or ``"make_monitored"``.
        criterion: The loss that the trainer minimises, as
            ``criterion(logits, labels)``. Then the engine compares it with the
            gradients of single examples and with a few updates (``engine.audit``).
            ``"make_monitored"`` needs it.
        seed: Seed of the batches and of the noise. Default: a secret one. Who knows a
            seed can subtract the noise, so give one in experiments only.
        resume_from: The checkpoint folder from which the trainer resumes. Default:
            the one of the trainer's last step in its ``output_dir``.
        **options: Arguments of the method (``noise_multiplier``, ``max_grad_norm``,
            ``poisson_sampling``, ``grad_sample_mode`` ...), without module, optimizer
            and data loader. ``make_private_with_epsilon`` gets the trainer's number of
            epochs if ``epochs`` is not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If ``prepare`` is not one of the three. ``Trainer.train`` raises it
            if the trainer does something that cannot be accounted for (several
            processes, accumulated gradients, scaled losses), or if a run cannot be
            resumed.
        AccountingError: In ``Trainer.train``, if the criterion or the loss of the model
            does not give each example a loss of its own. Training stops then.
    """

    def __init__(
        self,
        engine: PrivacyEngine,
        *,
        prepare: str = "make_private",
        criterion: Any = None,
        seed: int | None = None,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        if TrainerCallback is object:
            raise ImportError(
                "PrivacyCallback needs transformers, which is not installed. Run: pip "
                "install 'transformers>=5' accelerate"
            )
        super().__init__()
        require_preparation(prepare)
        self.engine, self.prepare, self.criterion = engine, prepare, criterion
        self.seed, self.resume_from, self.options = seed, resume_from, options
        self._hooks: AbstractGradSampleHooks | None = None
        self._optimizer: Optimizer | None = None  # the trainer's own
        self._loader: DataLoader[Any] | None = None
        self._num_steps = 0  # since the training began

    @property
    def _is_private(self) -> bool:
        return self.prepare != "make_monitored"

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        **others: Any,
    ) -> None:
        """Prepare what the trainer has made, and give it the prepared objects.

        Args:
            args: The trainer's ``TrainingArguments``.
            state: Its state, with the number of steps so far.
            control: Not used.
            **others: The model, and Accelerate's wrappers of optimizer and loader.

        Raises:
            ValueError: If the run cannot be prepared, accounted for or resumed.
            AccountingError: If the audit of the criterion fails.
        """
        if self._hooks is not None:  # of a training that failed
            self._hooks.cleanup()
        model, optimizer = others["model"], others["optimizer"]
        train_dataloader = others["train_dataloader"]
        _check_arguments(args, is_private=self._is_private)
        _check_loader(train_dataloader)
        self._optimizer = optimizer.optimizer
        self._loader = train_dataloader.base_dataloader
        _check_columns(args, self._loader)
        options = self._all_options(args, state)
        if self._is_private:
            _check_recomputation(model, options.get("grad_sample_mode"))
        saved = self._saved_engine(args, state)
        model.train()
        prepared = getattr(self.engine, self.prepare)(
            module=model,
            optimizer=self._optimizer,
            data_loader=self._loader,
            **options,
        )
        require_three(prepared, options.get("grad_sample_mode"))
        hooks, optimizer.optimizer, train_dataloader.base_dataloader = prepared
        self._hooks = hooks if self._is_private else None
        self._num_steps = 0
        # The trainer has loaded the state of its optimizer before training begins.
        self.engine.checkpoints.trainer_has_optimizer = True
        if saved is not None:
            self.engine.load_checkpoint(path=saved, module=nn.Identity())
        if self.criterion is not None:
            audit = self.engine.audit(self.criterion)
            if not audit.passed:
                raise AccountingError(str(audit))

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, **others: Any
    ) -> None:
        """Clear the gradients of single examples, which a trainer does not know.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **others: Accelerate's wrapper of the optimizer, among others.
        """
        others["optimizer"].optimizer.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop a run whose numbers would be refused, during its first updates.

        Args:
            args: Not used.
            state: The trainer's state, with the number of steps.
            control: Not used.
            **others: Not used.

        Raises:
            AccountingError: If a link of the chain of custody is broken.
        """
        if state.global_step <= _NUM_FIRST:
            self._stop_if_refused()
        self._num_steps += 1
        if self._num_steps == 1:
            self._say_if_loss_is_not_seen()

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop a run whose numbers would be refused, whenever the trainer logs.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **others: Not used.

        Raises:
            AccountingError: If a link of the chain of custody is broken.
        """
        self._stop_if_refused()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the engine in the checkpoint that the trainer has just written.

        Args:
            args: The trainer's arguments, with its ``output_dir``.
            state: Its state, with the number of steps.
            control: Not used.
            **others: Not used.
        """
        path = _folder(args, state) / _FILE
        self.engine.save_checkpoint(path=path, module=nn.Identity())

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        **others: Any,
    ) -> None:
        """Remove the hooks from the model, and give the trainer its objects back.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **others: Accelerate's wrappers of optimizer and loader, among others.
        """
        if self._hooks is not None:
            self._hooks.cleanup()
        others["optimizer"].optimizer = self._optimizer
        others["train_dataloader"].base_dataloader = self._loader
        self._hooks = self._optimizer = self._loader = None

    # ------------------------------------------------------------------------- helpers
    def _all_options(self, args: Any, state: Any) -> dict[str, Any]:
        """Return the options of the method that prepares the run.

        The generators of the loader are set, too.

        Args:
            args: The trainer's arguments.
            state: Its state.
        """
        options = dict(self.options)
        if not self._is_private:
            options["criterion"] = self.criterion
        else:
            options["wrap_model"] = False
        if self.prepare == "make_private_with_epsilon":
            options.setdefault("epochs", state.num_train_epochs)
        if self.engine.secure_mode:
            return options
        sampling, noise = self._seeds(int(state.global_step))
        if self._loader is not None and self._loader.generator is None:
            self._loader.generator = torch.Generator().manual_seed(sampling)
        if options.get("noise_generator") is None:
            generator = torch.Generator(args.device).manual_seed(noise)
            options["noise_generator"] = generator
        return options

    def _seeds(self, step: int) -> tuple[int, int]:
        """Return two seeds; those of a resumed run are not those of the first part.

        Args:
            step: The step at which the trainer begins.
        """
        if self.seed is None:
            return secrets.randbits(63), secrets.randbits(63)
        drawn = np.random.SeedSequence([self.seed, step]).generate_state(2, np.uint64)
        return int(drawn[0]) >> 1, int(drawn[1]) >> 1

    def _saved_engine(self, args: Any, state: Any) -> Path | None:
        """Return the file of the engine if the trainer resumes; None if it does not.

        Args:
            args: The trainer's arguments.
            state: Its state.

        Raises:
            ValueError: If the file is not there, or the trainer would skip batches.
        """
        if not state.global_step:
            return None
        require_setting(
            "ignore_data_skip",
            args.ignore_data_skip,
            equals=True,
            remedy="Pass TrainingArguments(ignore_data_skip=True): a resumed run draws "
            "new batches, and has none to skip.",
        )
        folder = Path(self.resume_from or _folder(args, state))
        require(
            (folder / _FILE).is_file(),
            f"The trainer resumes from step {state.global_step}, but {folder} has no "
            f"{_FILE}, so the privacy losses of the earlier steps are not known.",
            "Pass PrivacyCallback(resume_from=...), the checkpoint folder of a run "
            "with this callback.",
        )
        return folder / _FILE

    def _stop_if_refused(self) -> None:
        """Raise if no number of this run will be given.

        Raises:
            AccountingError: With the reason.
        """
        chain = self.engine.recorder.chain
        reason = "" if chain is None else chain.refusal()
        if not reason or chain is None:
            return
        more = [_COMPARED] * (self.criterion is not None and chain.is_broken("loss"))
        more += [_DRAWN] * chain.is_broken("schedule")
        raise AccountingError(" ".join([reason, *more]))

    def _say_if_loss_is_not_seen(self) -> None:
        """Warn if nothing looks at the loss, which the trainer computes itself."""
        chain = self.engine.recorder.chain
        if chain is None or self.criterion is not None:
            return
        if not chain.is_reported("loss"):
            warnings.warn(_NOT_SEEN, stacklevel=2)


def _folder(args: Any, state: Any) -> Path:
    """Return the checkpoint folder of the trainer's last step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_arguments(args: Any, *, is_private: bool) -> None:
    """Raise if an update would not be one optimizer's step on one batch.

    Args:
        args: The trainer's arguments.
        is_private: Whether gradients of single examples are clipped.

    Raises:
        ValueError: If an argument must be changed; the message names it.
    """
    for name, (value, remedy) in _SETTINGS.items():
        require_setting(name, getattr(args, name), equals=value, remedy=remedy)
    expect(
        args.n_gpu <= 1,
        "n_gpu",
        args.n_gpu,
        "must be at most 1",
        "Set CUDA_VISIBLE_DEVICES to one device.",
    )
    if not is_private:
        require_setting(
            "max_grad_norm",
            args.max_grad_norm,
            equals=0.0,
            remedy="Pass TrainingArguments(max_grad_norm=0.0): a clipped batch "
            "gradient is not the mean of the examples' gradients.",
        )


def _check_recomputation(model: nn.Module, grad_sample_mode: str | None) -> None:
    """Raise if layers are run again in the backward pass, which Opacus cannot follow.

    Args:
        model: The trainer's model.
        grad_sample_mode: The mode of the engine; the fast mode can follow it.

    Raises:
        ValueError: If gradient checkpointing is on in another mode.
    """
    is_on = bool(getattr(model, "is_gradient_checkpointing", False))
    if grad_sample_mode != "fast":
        require_setting(
            "gradient_checkpointing",
            is_on,
            equals=False,
            remedy="Opacus computes no per-example gradients in layers that are run "
            'again. Pass PrivacyCallback(..., grad_sample_mode="fast"), with '
            "use_reentrant=False if you choose the kind of checkpoints, or leave "
            "gradient checkpointing out.",
        )


def _check_loader(loader: Any) -> None:
    """Raise unless the trainer's data come from a torch loader that can be exchanged.

    Args:
        loader: The trainer's loader.

    Raises:
        ValueError: If they do not.
    """
    base = getattr(loader, "base_dataloader", None)
    expect(
        isinstance(base, DataLoader) and hasattr(base.dataset, "__len__"),
        "train_dataset",
        f"a {type(loader).__name__}",
        "must have a length, and be loaded by Trainer.get_train_dataloader",
        "Use a map-style data set, and leave get_train_dataloader as it is.",
    )


def _check_columns(args: Any, loader: DataLoader[Any]) -> None:
    """Raise if the collator fails on columns of texts, which the trainer has kept.

    Args:
        args: The trainer's arguments.
        loader: The loader that the trainer has made; two items are read.

    Raises:
        ValueError: If it does.
    """
    if args.remove_unused_columns:
        return
    examples = Examples(loader.dataset, loader.collate_fn, 2)
    items = next(map(examples.items, examples.places(1)), [])
    if names := ", ".join(columns_of_text(items)):
        try:
            examples.collated(items)
        except COLLATE_ERRORS as error:
            raise ValueError(
                "remove_unused_columns must be True, or the data set without texts, "
                f"got False and the columns {names}, of which the collator cannot make "
                f"tensors. Pass data_set.remove_columns([{names}]) as train_dataset."
            ) from error

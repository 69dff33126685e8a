"""Checkpoints of a recorded run, from which a killed one can be resumed exactly."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import opacus
from opacus.accountants import IAccountant

from opacus_pi._validate import expect
from opacus_pi.accounting import RenyiFilter
from opacus_pi.files.atomic_file import replacing
from opacus_pi.files.sealed_state import sealed, unsealed
from opacus_pi.integration.accountants import num_steps_of
from opacus_pi.integration.filter_setup import resume_charges, saved_charges
from opacus_pi.integration.opacus_engine import Engine
from opacus_pi.integration.run_state import RunState
from opacus_pi.recording import Recorder
from opacus_pi.recording.saved_run import require_version

CHECKPOINT_KEY = "opacus_pi"
FILTER_KEY = "opacus_pi_filter"
_STATE = "run_state."


class Checkpoints(Engine):
    """Saving and loading of an engine that has a recorder; goes before Opacus's."""

    recorder: Recorder
    accountant: IAccountant
    renyi_filter: RenyiFilter | None
    _refuse: Callable[[str], None]
    _begun: bool
    _run_state: RunState | None

    @wraps(opacus.PrivacyEngine.save_checkpoint, assigned=())
    def save_checkpoint(
        self,
        *,
        path: Any,
        checkpoint_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Save as Opacus does, with record and random states under a key of its own.

        Opacus's engine loads the checkpoint too. It serves monitored training as well:
        give the plain module and optimizer. Where every process of a distributed run
        has a record of its own, each saves a file of its own.

        Args:
            path: A name, which the whole file takes at once, so that a killed process
                leaves the checkpoint before; or a file object, written to directly.
            checkpoint_dict: Entries of your own (epoch, schedules); filled in place.
            **options: Of Opacus: ``module``, ``optimizer``, and more.
        """
        filled = checkpoint_dict or {}
        if self._begun:
            state = {
                f"{_STATE}{n}": v
                for n, v in cast(RunState, self._run_state).state_dict().items()
            }
            filled[CHECKPOINT_KEY] = sealed({**self.recorder.state_dict(), **state})
            if self.renyi_filter is not None:
                filled[FILTER_KEY] = sealed(saved_charges(self.renyi_filter))
        save = super().save_checkpoint
        if not isinstance(path, (str, os.PathLike)):
            save(path=path, checkpoint_dict=filled, **options)
            return
        with replacing(path) as temporary:
            save(path=temporary, checkpoint_dict=filled, **options)

    @wraps(opacus.PrivacyEngine.load_checkpoint, assigned=())
    def load_checkpoint(
        self, *, restore_rng: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Load as Opacus does, and continue the record if the checkpoint has one.

        Resumed with ``restore_rng=True``, a training loop ends with the weights and the
        ledger of the run that was not interrupted, bit for bit, on the same machine:

        * from a checkpoint between epochs, always. The loop goes on with the epoch
          after it;
        * from one within an epoch, after an ``optimizer.step()``: the first pass over
          the loader is the rest of that epoch. Refused inside ``BatchMemoryManager``,
          and with workers where batches are drawn from torch's global generator or by a
          sampler of your own.

        Not restored: random states inside persistent workers, learning rate schedules
        and other objects of yours (put their states into ``checkpoint_dict``).

        Args:
            restore_rng: Whether to restore the states of all generators (``random``,
                numpy, torch, CUDA, those of loader, sampler and noise), the position in
                the epoch, and the noise multiplier and clip norm that schedules had
                reached. Call ``make_private`` or ``make_monitored`` first.
            **options: Of Opacus: ``path``, ``module``, ``optimizer``, and more.

        Returns:
            The checkpoint, with your own entries.

        Raises:
            ValueError: If ``restore_rng`` cannot be kept: no run is prepared (nothing
                is loaded then), or the checkpoint has no states, is damaged, or was
                taken at a moment from which a run cannot be resumed exactly; or if a
                ``RenyiFilter`` cannot go on with the budgets that were saved.
        """
        expect(
            self._begun or not restore_rng,
            "restore_rng",
            restore_rng,
            "to follow make_private or make_monitored",
            "Prepare the run first: its loader and generators are restored.",
        )
        checkpoint: dict[str, Any] = super().load_checkpoint(**options)
        charges = checkpoint.pop(FILTER_KEY, None)
        resume_charges(self.renyi_filter, charges, num_steps_of(self.accountant))
        state = checkpoint.pop(CHECKPOINT_KEY, {})
        if state != {}:
            state = self._continue(state, required=restore_rng)
        if restore_rng:
            own = [name for name in state if name.startswith(_STATE)]
            states = {name.removeprefix(_STATE): state[name] for name in own}
            cast(RunState, self._run_state).load_state_dict(states)
        return checkpoint

    def _continue(self, state: Any, *, required: bool) -> dict[str, Any]:
        """Continue a checkpoint's record, or refuse the ledger; what was saved."""
        whole: dict[str, Any] = {}
        try:
            require_version(state)
            whole = unsealed(state)
            self.recorder.load_state_dict(whole)
        except ValueError as error:
            if required and not whole:
                raise
            self._refuse(f"The checkpoint's record cannot be continued: {error}")
        return whole

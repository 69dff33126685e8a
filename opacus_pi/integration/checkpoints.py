"""Checkpoints of a recorded run, from which an interrupted run resumes exactly.

Opacus saves weights and accountant. Added under one key are the recorded run, checksums
of what each index of the data set contained, and what decides how the run goes on: the
states of all random number generators, the position in the pass over the loader, the
epochs of its samplers, and the noise multiplier and clip norm that schedules and
adaptive clipping have reached. Our entries are tensors, numbers and strings only.

Opacus loads checkpoints with ``weights_only=False``, which unpickles any object and so
runs whatever code a file holds. ``without_code`` reads the file with
``weights_only=True`` first and gives Opacus only what that accepted.

A resumed run ends with the weights and the ledger of the uninterrupted one, bit for
bit, on the same machine. That breaks where a state cannot be read: secure random
numbers, generators inside persistent workers, objects of the user's own.
"""

import copy
import io
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from opacus.accountants import IAccountant, RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect
from opacus_pi.accounting import GradNormLedger, RenyiFilter
from opacus_pi.attribution import EpochPosition, Tracker
from opacus_pi.attribution.item_contents import ItemContents
from opacus_pi.files.checksummed_state import verified_state, with_checksum
from opacus_pi.files.torch_file import read_torch_file
from opacus_pi.integration.accountants import num_steps_of
from opacus_pi.integration.checks import RunChecks
from opacus_pi.integration.filtering import prepared_charges, saved_charges
from opacus_pi.integration.opacus_compat import has_skipped_last_step
from opacus_pi.integration.optimizer_states import (
    NOT_LOADED,
    OTHER_STATE,
    are_different,
    has_state,
    state_name,
)
from opacus_pi.integration.schedules import is_poisson, unknown_schedule
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.custody import Custody
from opacus_pi.models.weights_name import weights_name
from opacus_pi.recording import Recorder
from opacus_pi.recording.random_states import RandomStates
from opacus_pi.recording.saved_state import require_version

# Where a checkpoint of Opacus has our entries. Opacus ignores keys that it does not
# know.
CHECKPOINT_KEY = "opacus_pi"
FILTER_KEY = "opacus_pi_filter"
_HISTORY = "accountant_history"
_OPTIMIZER = "optimizer_state"  # a hash of it
_CONTENTS = "item_contents."  # prefix of what each index of the data set contained
_RUN_STATE = "run_state."  # prefix of the entries that are not the recorder's

# Prefixes of the parts of a run state, and the settings of an optimizer in it.
_RANDOM, _POSITION, _EPOCH, _SETTING = "random.", "position.", "epoch.", "setting."
_MECHANISMS = ("rdp", "gdp", "prv", "per_instance", "group")  # of known histories
_SETTINGS = ("noise_multiplier", "max_grad_norm")
_SAMPLERS = ("batch_sampler", "sampler")
_WITHIN_AN_UPDATE = (
    "It was saved between two parts of one batch, and does not contain the gradients "
    "of the earlier parts. Save right after optimizer.step() has updated the weights."
)
_OTHER_HISTORY = (
    "The accountant's history in the checkpoint ({} updates) is not the one that was "
    "saved together with the recorded run: the file was edited, or put together from "
    "two checkpoints. Neither get_epsilon nor the ledger covers such a run. Resume "
    "from an unchanged checkpoint."
)
_OTHER_WEIGHTS = (
    "The weights in the checkpoint are not those that the recorded run had after its "
    "last update: the file was edited, put together from two checkpoints, or saved "
    "with another module. The ledger does not cover such a model. Resume from an "
    "unchanged checkpoint of the module that was trained."
)
_NOT_CONTINUED = "The checkpoint's recorded run cannot be continued: {error}"
_SECURE = (
    "An engine with secure_mode=True draws random numbers that cannot be repeated. "
    "Load the checkpoint without restore_rng."
)
_OTHER_OBJECTS = (
    "Nothing was loaded. If you trust the author of the file, pass torch_load_kwargs="
    '{"weights_only": False}: it is then loaded as by Opacus, which runs code from it. '
    "Or allow these types by torch.serialization.add_safe_globals([...])."
)


# ----------------------------------------------------------- reading without running it
def without_code(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``load_checkpoint`` with a file from which no code can run.

    Opacus unpickles the file itself. So the content is read safely, and Opacus gets a
    copy in memory that holds just that content. The copy exists only while the
    checkpoint is loaded.

    Args:
        options: Options of Opacus's ``load_checkpoint``. A user who passes
            ``weights_only=False`` in ``torch_load_kwargs``, or a ``pickle_module``,
            gets Opacus's own loading: the path stays the same.

    Raises:
        ValueError: If the file holds objects that only unpickling can load, or is no
            checkpoint of an engine.
    """
    how = dict(options.get("torch_load_kwargs") or {})
    is_safe = how.pop("weights_only", "pickle_module" not in how)
    if not is_safe or "path" not in options:
        return {**options, "torch_load_kwargs": how}
    content = read_torch_file(options["path"], remedy=_OTHER_OBJECTS, **how)
    _require_checkpoint(content, options["path"])
    if not options.get("module_load_dict_kwargs"):
        _require_weights(content, options["path"], options.get("module"))
    safe = io.BytesIO()
    torch.save(content, safe)  # what weights_only=True has accepted
    safe.seek(0)
    return {**options, "path": safe, "torch_load_kwargs": None}


def _require_checkpoint(content: Any, path: Any) -> None:
    """Refuse a file of ``torch.save`` that no engine has saved.

    Args:
        content: What the file holds.
        path: Its name, for the message.

    Raises:
        ValueError: If an entry that Opacus loads is missing or of another type.
    """
    found = content if isinstance(content, Mapping) else {}
    wrong = [
        name
        for name, is_right in {
            "module_state_dict": _is_state_of_module,
            "privacy_accountant_state_dict": _is_state_of_accountant,
            "optimizer_state_dict": _is_state_of_optimizer,
        }.items()
        if not is_right(found.get(name))
    ]
    is_bare = bool(found) and _is_state_of_module(found)
    kind = "a state dict" if is_bare else f"a {type(content).__name__}"
    expect(
        not wrong,
        "path",
        f"{kind} in {path}",
        "must be a checkpoint of PrivacyEngine.save_checkpoint with the complete "
        f"entries {', '.join(wrong)}",
        "Nothing was loaded. "
        + (
            "Load weights alone by module.load_state_dict(torch.load(path))."
            if is_bare
            else "Resume from another checkpoint."
        ),
    )


def _require_weights(content: Mapping[str, Any], path: Any, module: Any) -> None:
    """Refuse to load weights from a checkpoint that was saved without any.

    Args:
        content: What the file holds.
        path: Its name, for the message.
        module: The module that is to get them.

    Raises:
        ValueError: If the module has tensors and the checkpoint has none.
    """
    has_none = not content["module_state_dict"]
    expect(
        not (has_none and isinstance(module, nn.Module) and module.state_dict()),
        "module",
        f"a {type(module).__name__}",
        f"must be torch.nn.Identity() for {path}, which has no weights: a trainer "
        "stores them beside it",
        "Nothing was loaded. Resume the trainer with its callback, or read the ledger "
        "by opacus_pi.integration.checkpoints.ledger_in_checkpoint(path).",
    )


def _is_state_of_module(state: Any) -> bool:
    """Return whether a value has the form of a module's state dict."""
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or "extra_state" in name)
        for name, value in state.items()
    )


def _is_state_of_optimizer(state: Any) -> bool:
    """Return whether a value has the form of an optimizer's state dict, or is empty."""
    if not state:
        return state is None or isinstance(state, Mapping)
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def _is_state_of_accountant(state: Any) -> bool:
    """Return whether a value has the form of an accountant's state dict.

    The history of Opacus's accountants is checked. A user's own accountant may have
    another one, or none.
    """
    if not isinstance(state, Mapping):
        return False
    if state.get("mechanism") not in _MECHANISMS:
        return True
    history = state.get("history")
    return isinstance(history, list) and all(map(_is_counted, history))


def _is_counted(entry: Any) -> bool:
    """Return whether a history entry is noise multiplier, sample rate and a count."""
    if not isinstance(entry, tuple | list) or len(entry) != 3:
        return False
    if not all(isinstance(number, int | float) for number in entry):
        return False
    noise, rate, count = entry
    return bool(0 <= noise < math.inf and 0 <= rate <= 1 and 0 <= count == int(count))


@contextmanager
def all_or_nothing(
    accountant: IAccountant,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    noise_scheduler: Any = None,
    grad_clip_scheduler: Any = None,
    **_: Any,
) -> Iterator[None]:
    """Context that undoes what Opacus loaded, if an error ends it.

    Opacus loads one object after the other, and torch loads the weights that fit before
    it refuses the others.

    Args:
        accountant: The engine's.
        module: What Opacus made of the model, or the model.
        optimizer: Opacus's or a plain one.
        noise_scheduler: Opacus's.
        grad_clip_scheduler: Opacus's.
        **_: The other options of ``load_checkpoint``.
    """
    schedulers = [s for s in (noise_scheduler, grad_clip_scheduler) if s is not None]
    settings = [dict(vars(scheduler)) for scheduler in schedulers]
    weights = {n: _copied(value) for n, value in module.state_dict().items()}
    counted = copy.copy(vars(accountant))
    counted["history"] = list(getattr(accountant, "history", []))
    parts = None if optimizer is None else (optimizer.state, optimizer.param_groups)
    try:
        yield
    except BaseException:
        module.load_state_dict(weights)
        vars(accountant).update(counted)
        for scheduler, before in zip(schedulers, settings, strict=True):
            vars(scheduler).clear()
            vars(scheduler).update(before)
        if optimizer is not None and parts is not None:
            cast(Any, optimizer).state, optimizer.param_groups = parts
        raise


def ledger_in_checkpoint(path: str | os.PathLike[str]) -> GradNormLedger:
    """Return the ledger of the run that a checkpoint recorded, without an engine.

    Args:
        path: A file of ``save_checkpoint``; no code from it is run.

    Raises:
        ValueError: If the file is something else, damaged, or holds no recorded run.
        AccountingError: If the run cannot be accounted for.
    """
    try:
        content = read_torch_file(path, map_location="cpu")
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"path must be a complete checkpoint, got {os.fspath(path)}. The file is "
            "damaged, or another kind of archive. Restore it from a copy."
        ) from error
    entry = content.get(CHECKPOINT_KEY) if isinstance(content, dict) else None
    expect(
        isinstance(entry, Mapping),
        "path",
        os.fspath(path),
        "must be a checkpoint with a recorded run",
        "Save it by opacus_pi.PrivacyEngine.save_checkpoint, or save engine.ledger.",
    )
    require_version(entry)
    state = verified_state(entry, os.fspath(path))
    custody = Custody.from_json(state["custody"]) if state.get("custody") else Custody()
    recorder = Recorder(
        mode="swept" if state.get("source") == "swept" else "observed",
        unattributed="worst_case" if custody.allows_unattributed else "refuse",
    )
    recorder.load_state_dict(state)
    ledger, accountant = recorder.ledger, RDPAccountant()
    saved = content.get("privacy_accountant_state_dict")
    accountant.history = saved.get("history", []) if isinstance(saved, dict) else []
    counted, recorded = num_steps_of(accountant), ledger.mechanism.num_steps
    if counted > recorded:
        raise AccountingError(
            f"The checkpoint's accountant has counted {counted} updates, but its "
            f"ledger holds {recorded}: the ledger does not cover the whole training. "
            "Use one engine for each run, and resume from its own checkpoints."
        )
    return ledger


# -------------------------------------------------------------------- the engine's part
class Checkpoints:
    """The engine's part of checkpoints: entries beside Opacus's, written and read.

    Opacus's ``save_checkpoint`` writes whatever its argument ``checkpoint_dict`` holds,
    and ``load_checkpoint`` returns it, so both work with Opacus's own engine as well.

    Attributes:
        run_state: The state of the run that was prepared last; None before.
        trainer_has_optimizer: Whether a trainer saves and loads the optimizer of the
            run by itself, and has loaded it before the engine loads a checkpoint.
    """

    _tracker: Tracker | None = None
    _contents: ItemContents | None = None  # loaded before the run was prepared

    def __init__(self) -> None:
        self.run_state: RunState | None = None
        self.trainer_has_optimizer = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: no run, which has another loader."""
        return {"run_state": None, "trainer_has_optimizer": False}

    def begin(self, run_state: "RunState | None", tracker: Tracker) -> None:
        """Save and resume a run from now on.

        Args:
            run_state: The state of the run; None: nothing can be saved.
            tracker: Compares what an index contains with what it contained before.
        """
        self.run_state, self._tracker = run_state, tracker
        if self._contents is not None:
            tracker.contents, self._contents = self._contents, None

    def _continue_contents(self, contents: ItemContents) -> None:
        """Compare the data set with what it contained when a run was saved."""
        if self._tracker is None:
            self._contents = contents
        else:
            self._tracker.contents = contents

    def entries(
        self,
        recorder: Recorder,
        renyi_filter: RenyiFilter | None,
        accountant: IAccountant,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> dict[str, Any]:
        """Return the entries to add to a checkpoint; none before a run is prepared.

        Args:
            recorder: The engine's recorder, whose run is saved.
            renyi_filter: The engine's budgets; what was charged to each example is
                saved.
            accountant: The engine's; a copy of its history shows whether Opacus's entry
                was changed.
            optimizer: The one that is saved; a hash shows whether its state was
                changed. None: no optimizer is saved.

        Returns:
            Tensors, numbers and strings, with a checksum over each entry.
        """
        if self.run_state is None:
            return {}
        states = self.run_state.state_dict()
        prefixed = {f"{_RUN_STATE}{name}": value for name, value in states.items()}
        state = {**recorder.state_dict(), **prefixed, _HISTORY: _history_of(accountant)}
        saved = optimizer or self._trainers_optimizer()
        if saved is not None:
            state[_OPTIMIZER] = state_name(saved.state_dict())
        if self._tracker is not None:
            contents = self._tracker.contents.state_dict()
            state |= {f"{_CONTENTS}{name}": value for name, value in contents.items()}
        entries = {CHECKPOINT_KEY: with_checksum(state)}
        if renyi_filter is not None:
            entries[FILTER_KEY] = with_checksum(saved_charges(renyi_filter))
        return entries

    def require_restorable(self, *, restore_rng: bool) -> None:
        """Refuse to restore random states before there is a run that has them.

        Called before Opacus loads anything, so that a refusal changes nothing.

        Args:
            restore_rng: Whether the user asked for it.

        Raises:
            ValueError: If no run has been prepared.
        """
        if restore_rng and self.run_state is None:
            raise ValueError(
                "restore_rng=True restores the loader and the generators of a run, but "
                "none has been prepared. Call make_private or make_monitored first."
            )

    def _trainers_optimizer(self) -> DPOptimizer | None:
        """Return the optimizer that a trainer saves and loads; None: none does."""
        if not self.trainer_has_optimizer or self.run_state is None:
            return None
        return self.run_state.optimizer

    def _was_loaded_without_optimizer(self, recorder: Recorder) -> None:
        """Leave "weights" unchecked if the run's optimizer keeps a state of its own.

        Args:
            recorder: The engine's recorder.
        """
        optimizer = None if self.run_state is None else self.run_state.optimizer
        if recorder.chain is not None and has_state(optimizer):
            recorder.chain.leave_unchecked("weights", NOT_LOADED)

    def prepared_resume(
        self,
        checkpoint: dict[str, Any],
        recorder: Recorder,
        renyi_filter: RenyiFilter | None,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        accountant: IAccountant,
        restore_rng: bool,
        checks: RunChecks,
        source: str,
    ) -> Callable[[], None]:
        """Take our entries from a checkpoint, check them, and change nothing yet.

        Args:
            checkpoint: What Opacus loaded; our entries are removed.
            recorder: Continues the recorded run, if the checkpoint has one.
            renyi_filter: Continues with the charges, if there is a filter.
            module: The module, with the weights from the checkpoint.
            optimizer: With its state from the checkpoint; None: it was not loaded.
            accountant: The engine's, with the history from the checkpoint.
            restore_rng: Whether to restore everything that decides how the run goes on.
            checks: Keeps the reasons if the run cannot be continued.
            source: The name of the file, for messages.

        Returns:
            A function that continues what was recorded.

        Raises:
            ValueError: If the charges do not fit, or ``restore_rng`` is not possible.
            AccountingError: If the run cannot be continued, and the recorder is strict.
        """
        charges = checkpoint.pop(FILTER_KEY, None)
        loads = [prepared_charges(renyi_filter, charges, num_steps_of(accountant))]
        entry = checkpoint.pop(CHECKPOINT_KEY, {})
        state: dict[str, Any] = {}
        reasons: list[str] = []
        if entry != {}:
            try:
                require_version(entry)
                state = verified_state(entry, source)
                if contents := _part(state, _CONTENTS):
                    known = ItemContents.from_state_dict(contents)
                    loads.append(partial(self._continue_contents, known))
                loads.insert(0, recorder.prepared_load(state))  # it may delete files
                if state.get(_HISTORY, found := _history_of(accountant)) != found:
                    reasons.append(_OTHER_HISTORY.format(num_steps_of(accountant)))
                if _has_other_weights(module, checkpoint, state):
                    reasons.append(_OTHER_WEIGHTS)
                loaded = optimizer or self._trainers_optimizer()
                if are_different(state.get(_OPTIMIZER), loaded):
                    reasons.append(OTHER_STATE)
                if optimizer is None and (loaded is None or _OPTIMIZER not in state):
                    loads.append(partial(self._was_loaded_without_optimizer, recorder))
            except ValueError as error:
                if restore_rng and not state:
                    raise
                reasons.append(_NOT_CONTINUED.format(error=error))
        if restore_rng and self.run_state is not None:
            states = _part(state, _RUN_STATE)
            loads.append(self.run_state.prepared_load(states))
        checks.require_lenient(reasons)
        loads += [partial(checks.refuse, reason) for reason in reasons]
        return partial(_call_all, loads)


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    """Call functions, one after another."""
    for function in functions:
        function()


# ------------------------------------------------------- what decides how a run goes on
class RunState:
    """The state of a run that was prepared, beyond its weights and what was recorded.

    Args:
        loader: The loader that training iterates over; its passes are counted from
            now on.
        optimizer: The optimizer; only Opacus's have settings to save.
        noise_generator: Generator of the noise; None: torch's global one.
        is_secure: Whether random numbers come from a source that has no state.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        noise_generator: torch.Generator | None = None,
        is_secure: bool = False,
    ) -> None:
        # Loader and samplers may each have a generator of their own, or share one.
        own = {name: getattr(loader, name, None) for name in _SAMPLERS}
        self._samplers = {n: s for n, s in own.items() if s is not None}
        holders = {"loader": loader, **self._samplers}
        generators = {n: getattr(h, "generator", None) for n, h in holders.items()}
        generators["noise"] = noise_generator
        self._is_secure = is_secure
        self._random_states = RandomStates(
            {} if is_secure else {n: g for n, g in generators.items() if g is not None}
        )
        self._position = EpochPosition(
            self._random_states,
            loader,
            is_repeatable=unknown_schedule(loader) is None,
            is_poisson=is_poisson(loader),
        )
        is_private = isinstance(optimizer, DPOptimizer)
        self._optimizer: Callable[[], Any] = (
            weakref.ref(optimizer) if is_private else _no_optimizer
        )

    @property
    def optimizer(self) -> DPOptimizer | None:
        """The optimizer of the run; None if it is not Opacus's, or is gone."""
        found: DPOptimizer | None = self._optimizer()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the present state, as tensors, numbers and strings.

        Saving does not raise: where the run could not be resumed exactly from this
        moment, the state holds the reason under ``"obstacle"`` and nothing else. The
        error is raised when an exact resume is requested, because the checkpoint is
        good for everything else.

        Returns:
            One flat dict; the prefix of a name says which part an entry belongs to.
        """
        obstacle = self._obstacle()
        if obstacle:
            return {"obstacle": obstacle}
        optimizer = self._optimizer()
        settings = (
            {} if optimizer is None else {n: vars(optimizer)[n] for n in _SETTINGS}
        )
        parts = {
            _RANDOM: self._random_states.collect(),
            _POSITION: self._position.state(),
            _EPOCH: {
                name: sampler.epoch
                for name, sampler in self._samplers.items()
                if isinstance(getattr(sampler, "epoch", None), int)
            },
            _SETTING: {name: _copied(value) for name, value in settings.items()},
        }
        flat = {f"{p}{n}": v for p, part in parts.items() for n, v in part.items()}
        return {"obstacle": "", **flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state.

        Args:
            state: A dict returned by ``state_dict``.

        Raises:
            ValueError: As ``prepared_load``; nothing is changed then.
        """
        self.prepared_load(state)()

    def prepared_load(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a saved state, and change nothing yet.

        Args:
            state: A dict returned by ``state_dict``.

        Returns:
            A function that goes back to this state.

        Raises:
            ValueError: If the run cannot be resumed exactly from there, or the run
                prepared now has other generators.
        """
        obstacle = state.get(
            "obstacle",
            "It contains no random states. Save it with PrivacyEngine.save_checkpoint.",
        )
        if obstacle != "":
            known = obstacle if isinstance(obstacle, str) else "It is damaged."
            raise ValueError(
                f"The run cannot be resumed exactly from this checkpoint. {known}"
            )
        self._check_settings(state)
        self._random_states.check(_part(state, _RANDOM))
        self._position.check(_part(state, _POSITION))
        return partial(self._restore, state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state that was checked.

        The position comes after the random states: it needs those of this moment and
        those of the pass's start.

        Args:
            state: The saved state.
        """
        random_states = _part(state, _RANDOM)
        self._random_states.restore(random_states)
        self._position.resume(_part(state, _POSITION), random_states)
        for name, epoch in _part(state, _EPOCH).items():
            self._samplers[name].epoch = epoch
        optimizer = self._optimizer()
        for name, value in _part(state, _SETTING).items() if optimizer else ():
            setattr(optimizer, name, _copied(value))

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        """Refuse epochs of samplers that the run does not have, and wrong settings.

        Args:
            state: The saved state, which may come from a file that was edited.

        Raises:
            ValueError: With what was found and what the prepared run has.
        """
        epochs, settings = _part(state, _EPOCH), _part(state, _SETTING)
        expect(
            set(epochs) <= set(self._samplers)
            and all(type(epoch) is int for epoch in epochs.values())
            and set(settings) <= set(_SETTINGS)
            and all(_is_setting(value) for value in settings.values()),
            "the checkpoint",
            {**epochs, **settings},
            "must hold only the epochs of this loader's samplers "
            f"({', '.join(sorted(self._samplers)) or 'none has epochs'}) and the "
            f"settings {', '.join(_SETTINGS)}, each as a number",
            "Resume a run from its own checkpoint, with the loader of the saved run.",
        )

    def _obstacle(self) -> str:
        """Return why a run cannot be resumed exactly from now; empty if it can."""
        if self._is_secure:
            return _SECURE
        optimizer = self._optimizer()
        if optimizer is not None and has_skipped_last_step(optimizer):
            return _WITHIN_AN_UPDATE
        return self._position.obstacle()


def _part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix, by the rest of their names.

    Args:
        state: A flat state.
        prefix: One of the prefixes above, with its dot.
    """
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _has_other_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], state: Mapping[str, Any]
) -> bool:
    """Return whether the loaded weights are not those of the recorded run.

    A checkpoint may have no weights at all, if another program stores them.

    Args:
        module: The module, with the weights from the checkpoint.
        checkpoint: What Opacus loaded.
        state: The recorded run, which has the name of its weights if it is known.
    """
    name = state.get("weights") or CHANGED
    states = (checkpoint.get("module_state_dict", {}), module.state_dict())
    kinds = [{v.dtype for v in s.values() if isinstance(v, Tensor)} for s in states]
    has_same_types = kinds[0] == kinds[1]  # else the weights were rounded
    is_known = name != CHANGED and has_same_types and bool(kinds[0])
    return is_known and weights_name(module) != name


def _history_of(accountant: IAccountant) -> str:
    """Return what an accountant has counted, as text; empty if it cannot be known."""
    try:
        return json.dumps([[*map(float, e)] for e in accountant.history])
    except (TypeError, ValueError):  # a user's own accountant
        return ""


def _is_setting(value: Any) -> bool:
    """Return whether a value is a number that noise or clipping can be set to."""
    is_one = isinstance(value, Tensor) and value.numel() == 1
    return (is_one or type(value) in (int, float)) and 0 <= float(value) < float("inf")


def _copied(setting: Any) -> Any:
    """Return a copy that later updates do not change.

    Adaptive clipping keeps its clip norm as a tensor and changes it in place.
    """
    return setting.detach().clone() if isinstance(setting, Tensor) else setting


def _no_optimizer() -> None:
    """Stand in for a reference to an optimizer without settings."""

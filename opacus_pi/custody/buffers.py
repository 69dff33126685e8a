"""Watch the buffers of a model: only its own forward passes should write to them.

A buffer, such as a mean by which inputs are centred, is part of the model like a
weight, but no noise is added to it. The probe of the model
(:mod:`~opacus_pi.custody.model_probe`) looks at what a forward pass writes. What other
code writes, such as a training loop that keeps a running mean of its batches, is found
here: buffers are noted when a forward pass ends, and compared when the next one begins
and when results are read.

Tensors that layers keep in other attributes are watched in the same way. Those that no
forward pass reads and no state dict has, such as the state of a metric, are left out as
soon as the probe has seen this (:mod:`~opacus_pi.custody.read_tensors`).

So are trainable weights that are not among ``model.parameters()``: those of modules
that a layer holds in a plain list or dictionary. Opacus neither clips their gradients
nor adds noise to them, so a loop that trains them does so without privacy.

The probe sees what one batch does to a buffer. It cannot see that a buffer keeps the
largest activation of all batches, as observers do for quantisation: that of the probed
batch is there already. So buffers of floating-point numbers that forward passes in
training mode write to are noted, too. If one has other values when results are read,
and the probe did not see it change by itself, as a schedule does, this is said.

*Guarantee.* Three changes are found: a write that torch counts, a change of a whole
buffer, and a buffer that was replaced by one with other values. Nothing is written, and
no random number is drawn.

*What breaks it.* If torch does not count a write, such as one through ``.data``, only
16 entries of the buffer are compared. Not watched are writes before the first forward
pass, tensors that ``make_private`` has not seen, numbers and other attributes that are
no tensors, and models that are wrapped for distributed training.

>>> import warnings
>>> model, chain = nn.InstanceNorm1d(2, track_running_stats=True).eval(), Chain()
>>> link = watch_buffers(model, chain)
>>> _ = model(torch.ones(1, 2, 3))
>>> model.running_mean = torch.ones(2)
>>> with warnings.catch_warnings():
...     warnings.simplefilter("ignore")
...     _ = model(torch.ones(1, 2, 3))
>>> "'running_mean'" in chain.doubts()["weights"][0]
True
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import (
    counts_of_writes,
    forward_hooks,
    forward_pre_hooks,
    is_functorch_wrapped_tensor,
    own_buffers,
    own_parameters,
    remove_hooks,
)
from opacus_pi.custody.chain import Chain
from opacus_pi.custody.weights import WeightSnapshot, is_plain, sampled_entries

__all__ = ["BufferLink", "watch_buffers"]

_CHANGED = (
    "{what} of the model was changed outside of the model's forward passes. If its new "
    "values depend on training data, such as a running mean of the inputs, the model's "
    "outputs depend on examples without clipping and without noise, and neither "
    "get_epsilon nor the ledger covers the model: keep the buffer fixed during "
    "training. If they do not, as in a count of updates or a schedule, nothing needs "
    "to be done."
)

_TRAINED = (
    "The weight {name!r}, which is not among model.parameters(), was changed outside "
    "of the model's forward passes. If it was trained on training data, outputs of the "
    "model that use it depend on examples without clipping and without noise, and "
    "neither get_epsilon nor the ledger covers the model: freeze it before training, "
    "or make its module an attribute of the model or an entry of nn.ModuleList, so "
    "that it is trained with privacy. If it was computed from public data, or from "
    "weights that the private optimizer has updated, nothing needs to be done."
)

_WRITTEN = (
    "Forward passes in training mode write to the buffer {name!r} of the model, and "
    "its values have changed. Whether they depend on the examples is not known; the "
    "largest activation so far, which observers keep for quantisation, does. If they "
    "do, later outputs depend on earlier examples without any noise, so neither "
    "get_epsilon nor the ledger covers the model: keep the buffer fixed during "
    "training. If they do not, as in a schedule, nothing needs to be done."
)

# A layer, what returns one of its tables, and a key of this table.
_Place = tuple[
    Callable[[], nn.Module | None], Callable[[nn.Module], dict[str, Any]], str
]


class BufferLink:
    """Compare the buffers of a model with those after its last forward pass.

    Args:
        model: The user's module, with buffers; referred to weakly.
        chain: The chain of custody of the run. A change leaves its link "weights"
            unchecked, because what was written may be harmless.
        schedules: Names of buffers of which it is known that forward passes change
            them by themselves, read when results are; None: what forward passes write
            is not reported.
        unread: Names of tensors that no forward pass reads, as far as is known when it
            is looked at; they are not watched.

    Attributes:
        handles: Remove the hooks that ``watch_buffers`` has put on the model.
        num_watched: How many tensors of the model are watched.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        schedules: Collection[str] | None = None,
        unread: Set[str] = frozenset(),
    ) -> None:
        self.handles: tuple[RemovableHandle, ...] = ()
        self._chain = chain
        # Where tensors are: a walk over all layers in each pass would be slow.
        self._places = [
            (name, place)
            for prefix, layer in model.named_modules()
            for name, place in _places(prefix, layer)
        ]
        self._unregistered = dict(_unregistered_weights(model))
        self._places += self._unregistered.items()
        self._noted: dict[str, Tensor] = {}
        self._ids: list[int] = []
        self._writes: list[int] = []
        self._snapshot = WeightSnapshot()
        self._is_in_pass = False
        self._schedules, self._unread = schedules, unread
        self._written: set[str] = set()  # by forward passes in training mode
        self._first: dict[str, Tensor] | None = None  # entries before the first pass
        self.num_watched = len(self._places)
        self._buffers = {name for name, _ in model.named_buffers()}
        self._note(self._present())
        chain.on_read(self._compare, can_break=False)
        chain.on_read(self._report_written, can_break=False)

    def before_pass(self) -> None:
        """Compare the buffers: a forward pass is about to begin.

        Writes since a pass that raised an error may be its own, and are accepted.
        """
        if not self._is_in_pass:
            self._compare()
        self._is_in_pass = True
        if self._first is None:
            present = self._present()
            self._note(present)
            self._first = {n: _entries(t) for n, t in present.items() if _is_real(t)}

    def after_pass(self, *, is_training: bool = False) -> None:
        """Note the buffers: a forward pass has ended, and may have written to them.

        Args:
            is_training: Whether it was one in training mode.
        """
        self._is_in_pass = False
        self._leave_out_unread()
        present = self._present()
        ids, writes = list(map(id, present.values())), list(present.values())
        if is_training and (ids, counts_of_writes(writes)) != (self._ids, self._writes):
            self._written.update(self._written_since(present))
        self._note(present)

    def _written_since(self, present: dict[str, Tensor]) -> Iterator[str]:
        """Yield the names of the buffers that were written to since they were noted."""
        before = zip(self._noted.items(), self._writes, strict=True)
        noted = {name: (id(tensor), count) for (name, tensor), count in before}
        counts = counts_of_writes(list(present.values()))
        for (name, tensor), count in zip(present.items(), counts, strict=True):
            if noted.get(name) != (id(tensor), count):
                yield name

    def _report_written(self) -> None:
        """Leave "model" unchecked if forward passes may keep data in a buffer."""
        present, first = self._present(), self._first or {}
        for name in self._written & first.keys() & present.keys() & self._buffers:
            is_known = self._schedules is None or name in self._schedules
            if is_known or not _is_real(present[name]):
                continue
            if not _is_same(first[name], _entries(present[name])):
                self._chain.leave_unchecked("model", _WRITTEN.format(name=name))

    def state_dict_was_loaded(self) -> None:
        """Accept the write if it brought the buffers back, as after an evaluation."""
        self._snapshot.accept_writes()
        self._writes = counts_of_writes(list(self._noted.values()))

    def _present(self) -> dict[str, Tensor]:
        """Return the buffers by name; empty within ``vmap`` or ``grad``."""
        found = {
            name: tensor
            for name, (reference, table, key) in self._places
            if name not in self._unread
            and (layer := reference()) is not None
            and isinstance(tensor := table(layer).get(key), Tensor)
            and tensor.grad_fn is None
        }
        wrapped = any(map(is_functorch_wrapped_tensor, found.values()))
        return {} if wrapped else found

    def _note(self, present: dict[str, Tensor]) -> None:
        """Note these buffers, with their values."""
        if not present:
            return
        ids = list(map(id, present.values()))
        if ids != self._ids:
            self._noted, self._ids = present, ids
            self._snapshot.watch(present.values())
        self._writes = counts_of_writes(list(present.values()))
        self._snapshot.take()

    def _leave_out_unread(self) -> None:
        """Forget tensors of which it has become known that no forward pass reads them.

        What torch does not count of writes to the others since the last pass is lost.
        """
        if self._unread.isdisjoint(self._noted):
            return
        noted = zip(self._noted.items(), self._writes, strict=True)
        kept = [(*pair, num) for pair, num in noted if pair[0] not in self._unread]
        self._noted = {name: tensor for name, tensor, _ in kept}
        self._ids = [id(tensor) for _, tensor, _ in kept]
        self._writes = [num for *_, num in kept]
        self._snapshot.watch(self._noted.values())
        self._snapshot.take()

    def _compare(self) -> None:
        """Leave the link unchecked if buffers are not as they were noted."""
        self._leave_out_unread()
        noted, present = self._noted, self._present()
        if not noted or not present or self._is_in_pass:
            return
        is_changed = self._snapshot.has_changed() or self._snapshot.has_changed_late()
        if not is_changed and list(map(id, present.values())) == self._ids:
            return
        writes = counts_of_writes(list(noted.values()))
        names = [
            name
            for name, before, now in zip(noted, self._writes, writes, strict=True)
            if before != now
        ]
        names += [
            name
            for name in {**noted, **present}
            if not _is_same(noted.get(name), present.get(name))
        ]
        if names and names[0] in self._unregistered:
            self._chain.leave_unchecked("weights", _TRAINED.format(name=names[0]))
        elif is_changed or names:
            what = f"The buffer {names[0]!r}" if names else "A buffer"
            self._chain.leave_unchecked("weights", _CHANGED.format(what=what))
        self._note(present)


def _places(prefix: str, layer: nn.Module) -> Iterator[tuple[str, _Place]]:
    """Yield the name and the place of each buffer and each other tensor of a layer.

    Args:
        prefix: The layer's name in the model.
        layer: The layer.
    """
    start, reference = f"{prefix}." if prefix else "", weakref.ref(layer)
    for key in own_buffers(layer):
        yield start + key, (reference, own_buffers, key)
    for key, value in vars(layer).items():
        if isinstance(value, Tensor):
            yield start + key, (reference, vars, key)


def _unregistered_weights(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    """Yield name and place of each trainable weight that the model does not list.

    Modules are looked for in the attributes of the layers, and in the lists, tuples and
    dictionaries among them, but not in lists of lists.
    """
    known = {id(weight) for weight in model.parameters()}
    for start, module in _unregistered_modules(model):
        for prefix, part in module.named_modules(prefix=start):
            for name, weight in part.named_parameters(recurse=False):
                if weight.requires_grad and id(weight) not in known:
                    known.add(id(weight))
                    yield f"{prefix}.{name}", (weakref.ref(part), own_parameters, name)


_TABLES_OF_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has


def _unregistered_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in attributes of the layers, with names such as ``enc[0]``."""
    for prefix, layer in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for key, value in vars(layer).items():
            if key not in _TABLES_OF_TORCH:
                for place, module in _held_modules(value):
                    yield f"{start}{key}{place}", module


def _held_modules(value: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in an attribute, with their places such as ``[0]``."""
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, dict):
        yield from (
            (f"[{k!r}]", v) for k, v in value.items() if isinstance(v, nn.Module)
        )
    elif isinstance(value, list | tuple):
        yield from (
            (f"[{i}]", v) for i, v in enumerate(value) if isinstance(v, nn.Module)
        )


def _is_real(tensor: Tensor) -> bool:
    """Return whether entries of a tensor can be compared later: floating and dense."""
    return is_plain(tensor) and tensor.is_floating_point() and tensor.numel() > 0


def _entries(tensor: Tensor) -> Tensor:
    """Return copies of at most 16 entries."""
    return sampled_entries(tensor.detach()).clone()


def _is_same(before: Tensor | None, now: Tensor | None) -> bool:
    """Return whether a buffer is the same object, or one with the same values."""
    if before is now:
        return True
    if before is None or now is None or before.shape != now.shape:
        return False
    if before.dtype != now.dtype or {before.layout, now.layout} != {torch.strided}:
        return False
    return torch.equal(before.to(now.device), now)


class _PassHook:
    """A hook on the forward passes of a model; copies and pickles of it do nothing.

    Args:
        link: Compares the buffers; held by a weak reference.
        is_before: Whether it is called before a pass instead of after it.
    """

    def __init__(
        self, link: BufferLink | None = None, *, is_before: bool = False
    ) -> None:
        self._link = None if link is None else weakref.ref(link)
        self._is_before = is_before

    def __call__(self, module: nn.Module, *_: Any) -> None:
        link = None if self._link is None else self._link()
        if link is None:
            return
        if self._is_before:
            link.before_pass()
        else:
            link.after_pass(is_training=module.training)

    def __reduce__(self) -> tuple[Any, ...]:
        return _PassHook, ()


def watch_buffers(
    model: nn.Module,
    chain: Chain,
    schedules: Collection[str] | None = None,
    unread: Set[str] = frozenset(),
) -> BufferLink | None:
    """Watch a model's buffers from its next forward pass on.

    Args:
        model: The user's module. Hooks of an earlier call, or of a module that this
            one is a copy of, are removed.
        chain: The chain of custody of the run.
        schedules: As for ``BufferLink``.
        unread: As for ``BufferLink``.

    Returns:
        What the hooks report to, for the caller to keep: they refer to it weakly. None
        if the model has no tensors besides its parameters.
    """
    for table in (forward_pre_hooks(model), forward_hooks(model)):
        remove_hooks(table, _PassHook)
    link = BufferLink(model, chain, schedules, unread)
    if not link.num_watched:
        return None
    link.handles = (
        model.register_forward_pre_hook(_PassHook(link, is_before=True)),
        model.register_forward_hook(_PassHook(link)),
    )
    return link

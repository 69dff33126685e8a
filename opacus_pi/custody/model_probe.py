"""Find out whether a model treats the examples of a batch separately.

A gradient belongs to one example only if the model's output for it depends on no other
example. Batch statistics break this, and so does a recurrent layer that treats the
first dimension as time, which goes unnoticed if a batch has as many examples as a
sequence has steps.

The probe runs a batch again on a copy of the model, with half of its examples, chosen
at random, replaced by others, once for either half. Shapes and random draws stay the
same, and autograd records the passes as in training. The outputs of the examples that
stay must not change. The model's buffers must not change either: otherwise later
outputs would depend on earlier examples. Then one example is left out, which may not
change the outputs of the others either (:mod:`~opacus_pi.custody.batch_size_probe`).

* If they are equal bit for bit, which is usual, the model is separable on this batch.
* If they are not, rounding may be the cause, so the comparison is made again in
  float64, where a difference above 1e-9 of the largest output is not rounding.
* If the model fails on examples in another order, as models do that pack sorted
  sequences, the first example stays, and others are replaced by neighbours after them.
* If a run of the model cannot be repeated (it keeps a state, or its random draws depend
  on the content of the batch), the link stays unchecked, with a warning.

**Guarantee.** Nothing of the probe remains: copies share the weights and nothing else,
and random states are restored. ``ModelProbe`` repeats it only if the shape of an
example or the mode of a layer changes, at most eight times in a run.

**What breaks it.** A dependence that the first batch does not show: examples that
influence each other only for certain values, or in shapes beyond the eighth. If only
one example depends on only one other, both are in the same half with probability 1/2.
Where the order of examples is kept, a dependence on the first one alone is missed. A
state that is kept outside the layers is not detected. If autograd's memory does not
fit, the passes run without gradients, in which the model may do something else. Every
run of the probe has the padding of the batch, so it cannot find a model that averages
over padding whose length depends on the other examples; the link "rows" stands for
that, and ``engine.audit``.

>>> x = torch.arange(12.0).view(4, 3)
>>> probe_separability(nn.Linear(3, 2), (x,), {}).state
'checked'
>>> time_first = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.LSTM(3, 2))
>>> probe_separability(time_first, (x,), {}).state
'broken'
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_pi.custody.batch_size_probe import compare_without_one
from opacus_pi.custody.finding import Finding
from opacus_pi.custody.layer_rows import (
    LayerRows,
    fixed_layers,
    moved_layers,
    not_reversed,
    stayed_calls,
    uneven_layers,
)
from opacus_pi.custody.probed_call import (
    ProbedCall,
    ProbedRun,
    difference,
    distance,
    example_dims,
    no_trace,
    num_examples,
    rounding_of,
)
from opacus_pi.custody.read_tensors import unread_tensors
from opacus_pi.custody.separable_layers import separable_by_construction
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.models.batches import tensors_of
from opacus_pi.models.copies import unwrap

__all__ = ["MODEL_NOT_RUN", "ModelProbe", "probe_separability"]

MODEL_NOT_RUN = (
    "The model was not run a second time to check whether it treats examples "
    "separately, because Recorder(probe_model=False) was passed or its weights are "
    "sharded. engine.audit(criterion) on an unsharded model compares gradients."
)
# Probes of one run: for the first kinds of batches, and for more of those in which the
# number of examples equals another dimension, which may be taken for it.
_MAX_PROBES, _MAX_OF_EQUAL_SIZES = 4, 8
_FEWEST_IN_ORDER = 3  # with two, no example would be replaced
_FEWEST_LEFT = 2  # a single example may be repeated for a table of two rows
_ROUNDED = 1e-5  # relative change of a buffer that rounding may cause
_TOLERANCE = 1e-9  # in float64, relative to the largest output

_SEPARABLE = (
    "Replacing half of a batch of {size} examples did not change the model's outputs "
    "for the others."
)
_MIXED = (
    "The model mixes the examples of a batch: replacing some of {size} examples of "
    "shape {shape} changed the outputs of the others, by {share:.1g} times the "
    "largest output. So no gradient belongs to one example, and max_grad_norm does "
    "not bound what an example contributes. {cause}Use layers that treat each example "
    "alone."
)
_TIME_FIRST = (
    "The batch had as many examples as dimension {dim} has entries; a layer that "
    "expects another order of dimensions (batch_first=False) confuses the two. "
    "Statistics over the batch, and lengths computed from all examples, mix them, too. "
)
_OTHER_CAUSES = (
    "Statistics over the batch, lengths computed from all examples, and layers that "
    "expect another order of dimensions (batch_first=False) do this. "
)
_UNKNOWN_INPUT = (
    "Replacing rows of the model's second or a later input changed the outputs of "
    "other examples. There are two possible causes. If the model mixes examples, use "
    "layers that treat each example alone. If the input is a table shared by all "
    "examples, such as one of positions, make this table a buffer of the model."
)
_NOT_RUN = (
    "The model could not be run a second time to check whether it treats examples "
    "separately: {error}."
)
_SORTED = (
    "The model needs its examples in the order of their lengths, as "
    "pack_padded_sequence with enforce_sorted=True does, so it could not be run on "
    "other examples to check whether it treats examples separately. Keep "
    "enforce_sorted=True: with False, Opacus's recurrent layers have their gradients "
    "in another order than its other layers, and the ledger is refused."
)
_IN_ORDER = (
    " The first example stayed, and others were replaced by those after them only, "
    "because the model could not be run on examples in another order."
)
_NOT_REPEATABLE = (
    "The model gives other outputs when it is run again on the same batch with the "
    "same random numbers, so it could not be checked whether it treats examples "
    "separately."
)
_KEEPS_EXAMPLES = (
    "In a forward pass in training mode the model computes a buffer from the examples "
    "of the batch, such as a running mean or a codebook. Later outputs then depend on "
    "earlier examples without any noise, so neither get_epsilon nor the ledger covers "
    "the model. Keep the buffer fixed during training, or make it a parameter."
)
_REMEMBERS = (
    "The model keeps values of a batch, such as a hidden state, and its outputs for "
    "the next batch depend on it. So an example is in the gradients of later updates, "
    "too, which clipping does not bound and no accountant counts. Reset the state "
    "before every batch."
)
_MOVED = (
    "The layer {name!r} is given the examples in another order than the model: when "
    "some of {size} examples were replaced, its inputs at the places of the others "
    "changed. Its per-example gradients are taken for those of the examples at these "
    "places, so each norm mixes several examples, and max_grad_norm does not bound "
    "what an example contributes. Do not sort examples in the model. For packed "
    "sequences, sort each batch by length in collate_fn, and call "
    "pack_padded_sequence with enforce_sorted=True."
)
_FIXED = (
    "The inputs of the layer {name!r} have as many rows as the batch has examples, "
    "{size}, and no row changed when examples were replaced. So the rows may be "
    "something else, such as the nodes of a graph or positions. Its per-example "
    "gradients are then not those of the examples, and neither norms nor clipping are "
    'right. engine.audit(criterion) compares gradients; grad_sample_mode="fast" '
    "recognises layers that have as many rows for fewer examples, and does not take "
    "their rows for examples."
)
_OWN_ROWS = (
    "The rows of the layer {name!r} depend on the values of the examples, as after "
    "torch.unique: it had {size} rows for {size} examples, but {count} when some of "
    "them were replaced by others. "
)
_OWN_ORDER = (
    _OWN_ROWS + "The rows are not in the order of the examples: they were not reversed "
    "when the examples were. Per-example gradients are taken for those of the examples "
    "at the places of the rows, so each norm mixes several examples, and max_grad_norm "
    "does not bound what an example contributes. This holds in every grad_sample_mode. "
    "Give each layer one row for each example, in the order of the batch."
)
_PERHAPS_OWN_ORDER = (
    _OWN_ROWS + "If its rows are not those of the examples, in the order of the batch, "
    "each norm mixes several examples, and max_grad_norm does not bound what an "
    "example contributes. engine.audit(criterion) compares the norms with those of "
    "single examples. Give each layer one row for each example, in the order of the "
    "batch."
)
_RANDOM = (
    "In evaluation mode the model treats examples separately. In training mode this "
    "could not be checked, because the model's random numbers depend on the content of "
    "the batch."
)
_NO_OUTPUTS = (
    "No output of the model has one row for each of the {size} examples, so it could "
    "not be checked whether it treats examples separately."
)
_PACKED = (
    "The model's input is a packed sequence, whose rows are steps and not examples, so "
    "it could not be checked whether the model treats examples separately."
)
_DECLARE = (
    " If you know that the model treats examples separately, pass "
    "Recorder(probe_model=False) to declare it. "
    "engine.audit(criterion) compares gradients instead."
)


def _what_is_kept(call: ProbedCall, change: "_Change") -> str:
    """Return a sentence if a model stores data of a batch's examples; else empty.

    Buffers are part of the model. Tensors in other attributes matter only if the
    outputs for the next batch depend on them.

    Args:
        call: A call on the whole batch, in the precision of the training.
        change: The change of the outputs when half of the batch was replaced.
    """
    if not change.same_buffers:
        return _KEEPS_EXAMPLES
    if change.same_memory:
        return ""
    one, other = (call.run(call.half_replaced(kept)).outputs for kept in (0, 1))
    return _REMEMBERS if distance(one, other) > _ROUNDED else ""


def probe_separability(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_dim: int = 0,
    autocast: tuple[str, torch.dtype] | None = None,
    layers_in_order: bool = False,
    changed_buffers: set[str] | None = None,
    rows_are_examples: bool = False,
) -> Finding:
    """Run a batch with other examples, and compare the outputs of those that stay.

    Args:
        model: The model, plain or wrapped, in the mode in which it is to be probed.
        args: Its positional inputs, for at least two examples.
        kwargs: Its inputs by keyword.
        batch_dim: The dimension of the inputs along which the examples are.
        autocast: Device type and data type of automatic mixed precision, if it is on.
        layers_in_order: Whether row i of each layer's input must belong to example i,
            as Opacus assumes.
        changed_buffers: Names of buffers that the model changes are added to it.
        rows_are_examples: Whether gradients are taken from the rows of layers.

    Returns:
        Whether the model treats examples separately, with the reason.
    """
    if any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values())):
        return Finding("unchecked", _PACKED + _DECLARE)
    size = num_examples(tensors_of((args, kwargs)), batch_dim)
    call = ProbedCall(unwrap(model), tuple(args), kwargs, batch_dim, size, autocast)
    if changed_buffers is not None:
        call = replace(call, changed_buffers=changed_buffers)
    try:
        with no_trace():
            orders = {
                "layers_in_order": layers_in_order,
                "rows_are_examples": rows_are_examples,
            }
            try:
                return _compare(call, **orders)
            except torch.OutOfMemoryError:  # autograd keeps the values of each layer
                return _compare(replace(call, has_gradients=False), **orders)
            except MODEL_ERRORS as error:
                found = _compare_in_order(call, **orders)
                return _not_run(error) if found is None else found
    except MODEL_ERRORS as error:
        return _not_run(error)


def _compare_in_order(call: ProbedCall, **orders: bool) -> Finding | None:
    """Probe a model that fails if the order of the lengths of examples changes.

    Args:
        call: A call on a whole batch.
        **orders: As for ``_compare``.

    Returns:
        None if the model fails in this way, too, or has too few examples.
    """
    if call.size < _FEWEST_IN_ORDER:
        return None
    try:
        found = _compare(replace(call, keeps_order=True), **orders)
    except MODEL_ERRORS:
        return None
    return replace(found, sentence=found.sentence + _IN_ORDER)


def _not_run(error: Exception) -> Finding:
    """Say why a model was not probed.

    Args:
        error: What it raised.
    """
    lines = str(error).splitlines() or [""]
    if "sorted in decreasing order" in lines[0]:
        return Finding("unchecked", _SORTED + _DECLARE)
    what = f"{type(error).__name__}: {lines[0]}".rstrip(":. ")
    return Finding("unchecked", _NOT_RUN.format(error=what) + _DECLARE)


def _compare(
    call: ProbedCall, *, layers_in_order: bool, rows_are_examples: bool
) -> Finding:
    """Probe a model that can be copied and run.

    Args:
        call: A call on a whole batch.
        layers_in_order: As for ``probe_separability``.
        rows_are_examples: As for ``probe_separability``.
    """
    change = _change(call)
    if change is None:
        return Finding("unchecked", _NO_OUTPUTS.format(size=call.size) + _DECLARE)
    found = _compare_halves(call, change)
    if found is None or found.state != "broken":
        moved = _compare_layers(call) if layers_in_order and change.moved else None
        if moved is None and layers_in_order and change.uneven is not None:
            moved = _compare_reversed(call, *change.uneven)
        found = moved or found or compare_without_one(call, change.whole)
    is_sound = found is None or found.state == "checked"
    if is_sound and rows_are_examples and change.stayed:
        found = _compare_fixed(call, change) or found
    return found or Finding("checked", _SEPARABLE.format(size=call.size))


def _compare_fixed(call: ProbedCall, change: "_Change") -> Finding | None:
    """Look for layers whose inputs have as many rows as examples, but other ones.

    Args:
        call: A call on the whole batch whose outputs depend on no other example.
        change: What changed when half of the batch was replaced.

    Returns:
        None if no such layer was found.
    """
    if change.whole.has_drawn:
        call = replace(call, has_dropout=False)
        change = _change(call) or change
    if change.whole.has_drawn or not call.size > 1:
        return None  # rows of random numbers do not change, rightly
    halves = [call.half_replaced(kept) for kept in (0, 1)]
    if any(not _differ(call.inputs, half.inputs) for half in halves):
        return None
    fewer = _layers_without_last(call)
    names = fixed_layers(change.whole.layers, change.stayed, fewer, rounding_of(call))
    if names:
        names -= _given_states(call, fewer)
    if not names:
        return None
    return Finding("unchecked", _FIXED.format(name=min(names), size=call.size))


def _layers_without_last(call: ProbedCall) -> list[LayerRows]:
    """Return the calls of layers without the last example; empty if they are not known.

    Args:
        call: A call on the whole batch.
    """
    try:
        return call.without_last().run().layers if call.size > _FEWEST_LEFT else []
    except MODEL_ERRORS:
        return []


def _given_states(call: ProbedCall, fewer: list[LayerRows]) -> set[str]:
    """Return the layers whose rows change with the states that the model is given.

    A loop may give a recurrent model the state after the part of the sequences before.
    Its examples are along the second dimension, so the probe does not replace them, and
    the rows of the layer that is given the state stay. They are rows of the examples if
    they change where the state is replaced, and nothing changes for the other examples.

    Args:
        call: A call on the whole batch that draws no random numbers.
        fewer: The calls of layers without the last example, if they are known.
    """
    other, rounding = replace(call, replaces_states=True), rounding_of(call)
    change = _change(other, rounding=rounding)
    if change is None or change.share > rounding or change.moved:
        return set()
    whole = change.whole.layers
    still_fixed = fixed_layers(whole, change.stayed, fewer, rounding)
    return {rows.name for rows in whole} - still_fixed


def _differ(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether the inputs of two calls differ."""
    return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _compare_layers(call: ProbedCall) -> Finding | None:
    """Compare the inputs of layers for the examples that stay when others are replaced.

    Args:
        call: A call on the whole batch whose outputs depend on no other example.

    Returns:
        None if no layer was given the examples in another order.
    """
    calm = replace(call, has_dropout=False)
    try:
        change = _change(calm.in_float64(), rounding=_TOLERANCE)
    except MODEL_ERRORS:  # it computes in a type of its own
        change = _change(calm, rounding=rounding_of(call))
    if change is None or not change.same_draws or not change.moved:
        return None
    return Finding("broken", _MOVED.format(name=change.moved, size=call.size))


def _compare_reversed(call: ProbedCall, name: str, count: int) -> Finding:
    """Say what it means that a layer's rows depend on the values of the examples.

    Args:
        call: A call on the whole batch.
        name: A layer that has one row for each of its examples.
        count: How many rows it had when some of them were replaced.

    Returns:
        "broken" if its rows are not in the order of the examples.
    """
    texts = {"name": name, "count": count, "size": call.size}
    try:
        if _has_own_order(replace(call, has_dropout=False), name):
            return Finding("broken", _OWN_ORDER.format(**texts))
    except MODEL_ERRORS:  # it cannot be run on examples in another order
        pass
    return Finding("unchecked", _PERHAPS_OWN_ORDER.format(**texts))


def _has_own_order(call: ProbedCall, name: str) -> bool:
    """Return whether a layer's rows are not reversed although the examples are.

    Args:
        call: A call on the whole batch, without dropout.
        name: The layer.
    """
    try:
        exact, tolerance = call.in_float64(), _TOLERANCE
        whole = exact.run()
    except MODEL_ERRORS:  # it computes in a type of its own
        exact, tolerance = call, rounding_of(call)
        whole = exact.run()
    if whole.has_drawn:  # random numbers are not reversed
        return False
    backwards = exact.reversed().run()
    return name in not_reversed(whole.layers, backwards.layers, call.size, tolerance)


def _compare_halves(call: ProbedCall, change: "_Change") -> Finding | None:
    """Compare the outputs of those that stayed when half of the examples was replaced.

    Args:
        call: A call on the whole batch.
        change: What changed in the precision of the training.

    Returns:
        None if the outputs did not change.
    """
    kept = _what_is_kept(call, change)
    if kept:
        return Finding("broken", kept)
    if change.share == 0.0:
        return None
    tolerance = _TOLERANCE
    try:
        exact = call.in_float64()
        exact_change = _change(exact)
    except MODEL_ERRORS:  # it computes in a type of its own
        exact, exact_change, tolerance = call, change, rounding_of(call)
    if exact_change is None or exact_change.share <= tolerance:
        return None
    if distance(exact.outputs()[0], exact.outputs()[0]) > tolerance:
        return Finding("unchecked", _NOT_REPEATABLE + _DECLARE)
    return _compare_without_draws(exact, tolerance)


def _compare_without_draws(call: ProbedCall, tolerance: float) -> Finding | None:
    """Tell whether outputs change only because of other random numbers.

    Dropout may draw one random number for each entry that is not padding. The number of
    such entries in one example then decides which draws the next example gets.

    Args:
        call: The call whose outputs changed.
        tolerance: What rounding may change.

    Returns:
        None if random numbers are the only cause.
    """
    calm = replace(call, has_dropout=False)
    change = _change(calm)
    if change is None or change.share <= tolerance:
        return None
    if not change.same_draws:
        calm = replace(calm, is_training=False)
        change = _change(calm)
        if change is None or change.share <= tolerance or not change.same_draws:
            return Finding("unchecked", _RANDOM + _DECLARE)
    return _broken(calm, change.share, tolerance)


def _broken(call: ProbedCall, share: float, tolerance: float) -> Finding:
    """Return "broken", or "unchecked" if only inputs after the first have an influence.

    Args:
        call: The call whose outputs change.
        share: The change, relative to the largest output.
        tolerance: What rounding may change.
    """
    if len(call.inputs) > 1:
        of_first = _change(call, only_first=True)
        if of_first is None or of_first.share <= tolerance:
            return Finding("unchecked", _UNKNOWN_INPUT)
    shape = tuple(call.inputs[0].shape)
    confused = [d for d, n in enumerate(shape) if n == call.size]
    confused.remove(call.batch_dim)
    cause = _TIME_FIRST.format(dim=confused[0]) if confused else _OTHER_CAUSES
    one = _without(shape, call.batch_dim)
    return Finding(
        "broken", _MIXED.format(size=call.size, shape=one, share=share, cause=cause)
    )


@dataclass(frozen=True)
class _Change:
    """The change of outputs when examples were replaced.

    Attributes:
        whole: The run on the whole batch.
        share: The largest change of an output of an example that stayed, relative to
            the largest output.
        same_draws: Whether both runs drew equally many random numbers.
        same_buffers: Whether the buffers are equal after both runs, up to rounding.
        same_memory: Whether the tensors in attributes of layers are equal after both
            runs.
        moved: The name of a layer whose inputs changed at the places of the examples
            that stayed; empty if there is none.
        stayed: Places of the calls of layers that have as many rows as examples, none
            of which changed.
        uneven: A layer that has as many rows as examples, and how many it had when
            examples were replaced; None if there is none.
    """

    whole: ProbedRun
    share: float
    same_draws: bool
    same_buffers: bool
    same_memory: bool
    moved: str
    stayed: set[int]
    uneven: tuple[str, int] | None


def _change(
    call: ProbedCall, *, only_first: bool = False, rounding: float = 0.0
) -> _Change | None:
    """Compare the outputs of the examples that stay when the others are replaced.

    Args:
        call: The call on the whole batch.
        only_first: Whether to replace in the first input only.
        rounding: What rounding may change in the inputs of layers.

    Returns:
        None if no output has one row for each example.
    """
    whole = call.run()
    shares, same_draws, same_buffers, same_memory = [], True, True, True
    moved: list[str] = []
    stayed: list[set[int]] = []
    uneven: list[tuple[str, int]] = []
    for kept in (0, 1):
        other = call.half_replaced(kept, only_first=only_first)
        changed = other.run()
        same_draws &= torch.equal(whole.random_state, changed.random_state)
        same_buffers &= distance(whole.buffers, changed.buffers) <= _ROUNDED
        same_memory &= distance(whole.memory, changed.memory) <= _ROUNDED
        places = call.kept_places(kept)
        rows = (whole.layers, changed.layers)
        moved += moved_layers(*rows, places, call.size, rounding)
        stayed.append(stayed_calls(*rows, call.size))
        uneven += uneven_layers(*rows, call.size)
        for one, two in zip(whole.outputs, changed.outputs, strict=True):
            found = [difference(one, two, d, places) for d in example_dims(one, call)]
            shares += [min(found)] if found else []
    if not shares:
        return None
    name = moved[0] if moved else ""
    return _Change(
        whole,
        max(shares),
        same_draws,
        same_buffers,
        same_memory,
        name,
        set.intersection(*stayed),
        uneven[0] if uneven else None,
    )


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    """Return a shape without one of its dimensions: that of one example."""
    return (*shape[:dim], *shape[dim + 1 :])


@dataclass(eq=False)
class ModelProbe:
    """A probe that tests a model during training, at each new kind of batch.

    ``saw`` is called at every forward pass in training mode and keeps the inputs if the
    shape of an example or the mode of a layer is new; ``run`` probes them later, when
    the weights have not changed yet and the memory of the backward pass is free again.

    Args:
        model: A weak reference to the user's module.
        batch_dim: The dimension of the inputs along which the examples are.
        layers_in_order: Whether gradients are those of the rows of layers.
        changed_buffers: Names of buffers that the probed passes changed. If these
            depended on the examples, the finding was "broken".
        rows_are_examples: As for ``probe_separability``.
        unread: Names of the tensors that no probed pass has read (``read_tensors``).
    """

    model: weakref.ref[nn.Module]
    batch_dim: int = 0
    layers_in_order: bool = False
    changed_buffers: set[str] = field(default_factory=set)
    rows_are_examples: bool = False
    unread: set[str] = field(default_factory=set)
    _seen: set[Any] = field(init=False, default_factory=set)
    _waiting: Callable[[], Finding] | None = field(init=False, default=None)
    _layers: list[weakref.ref[nn.Module]] = field(init=False, default_factory=list)

    def saw(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any = None
    ) -> None:
        """Keep the inputs of a forward pass if they are of a new kind.

        Args:
            args: The model's positional inputs.
            kwargs: Its inputs by keyword.
            outputs: Not used.
        """
        model = self.model()
        if self._waiting is not None or model is None:
            return
        if len(self._seen) >= _MAX_OF_EQUAL_SIZES:
            return
        is_one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        tensors = args if is_one else tensors_of((args, kwargs))
        size = num_examples(tensors, self.batch_dim)
        if size < 2:
            return
        kind, equal_sizes = self._kind(model, tensors, size)
        if kind in self._seen:
            return
        if len(self._seen) >= _MAX_PROBES and not equal_sizes:
            return
        self._seen.add(kind)
        device = tensors[0].device.type
        is_mixed = torch.is_autocast_enabled(device)
        autocast = (device, torch.get_autocast_dtype(device)) if is_mixed else None

        def probe() -> Finding:
            dim = self.batch_dim
            self._note_unread(ProbedCall(model, args, kwargs, dim, size, autocast))
            if separable_by_construction(model, args, kwargs, batch_dim=dim):
                return Finding("checked", "Every layer treats each example alone.")
            return probe_separability(
                model,
                args,
                kwargs,
                batch_dim=dim,
                autocast=autocast,
                layers_in_order=self.layers_in_order,
                changed_buffers=self.changed_buffers,
                rows_are_examples=self.rows_are_examples,
            )

        self._waiting = probe

    def _note_unread(self, call: ProbedCall) -> None:
        """Note which tensors no probed pass has read.

        Args:
            call: A call of the model.
        """
        with no_trace():
            unread = unread_tensors(call)
        if len(self._seen) > 1:
            self.unread &= unread
        else:
            self.unread |= unread

    def _kind(
        self, model: nn.Module, tensors: Sequence[Tensor], size: int
    ) -> tuple[Any, tuple[int, ...]]:
        """Return the kind of a batch; of each kind only one batch is probed.

        Args:
            model: The model.
            tensors: Its inputs.
            size: The number of examples.

        Returns:
            Shapes and types of one example with the modes of all layers, and which of
            its dimensions are as large as the batch.
        """
        if not self._layers:  # a walk over the layers in every pass would be slow
            self._layers = [weakref.ref(module) for module in model.modules()]
        kind: list[Any] = [
            None if (layer := reference()) is None else layer.training
            for reference in self._layers
        ]
        dim = self.batch_dim
        for tensor in tensors:
            shape = tensor.shape
            kind += (shape[:dim] + shape[dim + 1 :], tensor.dtype)
        equal_sizes: tuple[int, ...] = ()
        one = kind[len(self._layers)]
        if size in one:
            equal_sizes = tuple([d for d, n in enumerate(one) if n == size])
        return (*kind, equal_sizes), equal_sizes

    def run(self) -> Finding | None:
        """Probe the inputs that were kept.

        Returns:
            The result; None if no inputs of a new kind were seen since the last call.
        """
        probe, self._waiting = self._waiting, None
        return None if probe is None else probe()

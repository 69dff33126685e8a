"""Layers for which Opacus computes wrong per-example gradients.

Opacus (1.6.0) has a function for each type of layer that computes per-example gradients
from the layer's inputs and output gradients. Compared with one backward pass for each
example, these are wrong for some options of a layer, or for some inputs:

========================  ==============================================================
layer                     wrong
========================  ==============================================================
``nn.EmbeddingBag``       a token that occurs twice in one example, ``mode="max"``,
                          ``per_sample_weights``, ``padding_idx``
``nn.Embedding``          padding tokens whose outputs are used (``padding_idx``)
both                      ``scale_grad_by_freq``; ``max_norm`` also writes to weights
                          outside of the noisy update
``nn.Conv1d`` to ``3d``   ``padding_mode`` other than ``"zeros"``
``nn.Conv2d``             inputs in another memory order (``channels_last``)
``DPLSTM, DPGRU, DPRNN``  packed sequences whose lengths were not sorted in the batch
any layer                 one that several modules contain: each of them counts once
========================  ==============================================================

In hooks mode the clipped sum is made of these gradients, so each contribution is still
bounded, but it is not the gradient of the example's loss. In ghost clipping the sum is
made of the true gradients, clipped by wrong norms, and no bound holds. Either way the
ledger is refused. ``grad_sample_mode="functorch"`` and ``"fast"`` and sweeps use other
rules, which are right for all of these layers or raise an error. Only the recurrent
layers are wrong in ``"functorch"`` mode, too: ``pack_padded_sequence`` with
``enforce_sorted=False`` sorts the examples, and these layers have their gradients in
the order of the lengths, while all other layers have them in the order of the batch.

``tests/integration/test_wrong_layers.py`` compares all layers of Opacus with autograd.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from opacus.grad_sample import (
    AbstractGradSampleHooks,
    GradSampleHooksFastGradientClipping,
)
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_pi._torch_compat import (
    both_sides_padding,
    forward_hooks,
    is_functorch_wrapped_tensor,
    remove_hooks,
)
from opacus_pi.custody import Chain
from opacus_pi.integration.opacus_compat import (
    keep_handle,
    module_of,
    num_captures,
    uses_opacus_gradients,
)
from opacus_pi.models.batches import tensors_of

__all__ = ["layers_opacus_gets_wrong", "watch_inputs"]

_REASON = "Opacus makes wrong updates of {where} ({layer}): {what}. {remedy}"
_SEVERAL_PARENTS = (
    "{} modules of the model contain it, and its gradients count {} times"
)
_ONE_PARENT = (
    "Keep the layer in one module, and use it from there. Alternatively, make two "
    "layers that share their parameters (second.weight = first.weight)."
)
_OTHER_MODE = (
    'Use grad_sample_mode="functorch" or "fast", which compute these gradients in '
    "another way."
)
_AS_EMBEDDING = (
    "Use nn.Embedding, and sum or average its output over the tokens of each example."
)
_Recurrent = (DPLSTM, DPGRU, DPRNN)
_Layer = nn.Module
_Rule = Callable[[Any], Iterator[tuple[str, str]]]
_WRITES = "makes every forward pass write to the weights of the batch's tokens"


def layers_opacus_gets_wrong(
    hooks: AbstractGradSampleHooks,
) -> Iterator[tuple[str, bool]]:
    """Yield a reason for each layer whose options Opacus does not handle.

    Args:
        hooks: What ``make_private`` returned for the model.

    Yields:
        The reason, and whether it shows that ε is no bound. Outside of ghost clipping
        a gradient that is wrong, but computed from one example, is clipped like a
        right one.
    """
    is_ghost = _clips_other_gradients(hooks)
    for name, layer in _trainable_layers(hooks):
        for kind, rule in _OPTIONS.items():
            if isinstance(layer, kind):
                for what, remedy in rule(layer):
                    yield (
                        _reason(name, layer, what, remedy),
                        is_ghost or _WRITES in what,
                    )
    for name, layer in module_of(hooks).named_modules():
        count = num_captures(layer)
        if count > 1:
            what = _SEVERAL_PARENTS.format(count, count)
            yield _reason(name, layer, what, _ONE_PARENT), is_ghost


def watch_inputs(hooks: AbstractGradSampleHooks, chain: Chain) -> None:
    """Look at the inputs of layers that Opacus handles for some inputs only.

    Args:
        hooks: What ``make_private`` returned for the model. Removing its hooks removes
            these, too. A second call replaces the chain.
        chain: Its link ``"norm"`` breaks when there is a reason; referred to weakly.
    """
    is_ghost = _clips_other_gradients(hooks)
    for name, layer in _trainable_layers(hooks):
        table = forward_hooks(layer)
        remove_hooks(table, _InputCheck)
        for kind, check in _INPUTS.items():
            if isinstance(layer, kind) and _needs_check(layer):
                rules_out = is_ghost or check is _check_packed
                hook = _InputCheck(name, check, chain, rules_out_epsilon=rules_out)
                handle = layer.register_forward_hook(hook, with_kwargs=True)
                keep_handle(module_of(hooks), handle)


def _clips_other_gradients(hooks: AbstractGradSampleHooks) -> bool:
    """Return whether a mode clips the true gradients by norms that may be wrong.

    Args:
        hooks: What ``make_private`` returned for the model.
    """
    return isinstance(hooks, GradSampleHooksFastGradientClipping)


def _trainable_layers(
    hooks: AbstractGradSampleHooks,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and layer where gradients come from a function of Opacus's.

    The weights of recurrent layers belong to the layers inside of them.
    """
    for name, layer in module_of(hooks).named_modules():
        is_recurrent = isinstance(layer, _Recurrent)
        own = layer.parameters(recurse=is_recurrent)
        if any(p.requires_grad for p in own) and (
            is_recurrent or uses_opacus_gradients(hooks, layer)
        ):
            yield name, layer


def _reason(name: str, layer: nn.Module, what: str, remedy: str) -> str:
    """Return why the run cannot be accounted for."""
    return _REASON.format(
        where=f"the layer {name!r}" if name else "the model",
        layer=type(layer).__name__,
        what=what,
        remedy=remedy,
    )


# ------------------------------------------------------------------- options of a layer
def _embedding_options(layer: nn.Embedding) -> Iterator[tuple[str, str]]:
    """Yield options of ``nn.Embedding`` and ``nn.EmbeddingBag`` that are ignored."""
    if layer.scale_grad_by_freq:
        yield (
            "scale_grad_by_freq=True divides gradients by how often a token occurs in "
            "the whole batch",
            "Leave the option out.",
        )
    if layer.max_norm is not None:
        yield (
            f"max_norm={layer.max_norm} {_WRITES}, without noise",
            "Leave the option out.",
        )


def _bag_options(layer: nn.EmbeddingBag) -> Iterator[tuple[str, str]]:
    """Yield options of ``nn.EmbeddingBag`` that are ignored."""
    if layer.mode == "max":
        yield 'with mode="max" all its per-example gradients are zero', _AS_EMBEDDING
    if layer.padding_idx is not None:
        yield "Opacus ignores padding_idx", _AS_EMBEDDING


def _convolution_options(layer: Any) -> Iterator[tuple[str, str]]:
    """Yield options of a convolution that are ignored."""
    if layer.padding_mode != "zeros" and any(both_sides_padding(layer)):
        yield f"Opacus ignores padding_mode={layer.padding_mode!r}", _OTHER_MODE


_Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPTIONS: dict[Any, _Rule] = {
    (nn.Embedding, nn.EmbeddingBag): _embedding_options,
    nn.EmbeddingBag: _bag_options,
    _Convolutions: _convolution_options,
}


# -------------------------------------------------------------------- inputs of a layer
class _InputCheck:
    """A forward hook that refuses for one kind of inputs; copies of it do nothing.

    Args:
        name: The layer's name in the user's model.
        check: Called with the layer, its arguments, its output and a function that
            takes what was found and the remedy. It may call that at once, or in the
            backward pass.
        chain: Its link breaks.
        rules_out_epsilon: Whether what is found shows that ε is no bound.
    """

    def __init__(
        self,
        name: str = "",
        check: Callable[..., None] | None = None,
        chain: Chain | None = None,
        *,
        rules_out_epsilon: bool = True,
    ) -> None:
        self._name, self._check = name, check
        self._rules_out_epsilon = rules_out_epsilon
        self._chain = None if chain is None else weakref.ref(chain)

    def __call__(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Check a pass in training mode that a backward pass can follow."""
        check = self._check
        chain = None if self._chain is None else self._chain()
        if check is None or chain is None or not layer.training:
            return
        if not torch.is_grad_enabled():
            return
        outputs = (out,) if isinstance(out, Tensor) else tensors_of(out)
        if any(map(is_functorch_wrapped_tensor, outputs)):
            return
        name = self._name

        def found(what: str, remedy: str) -> None:
            self._check = None  # the first reason is enough
            reason = _reason(name, layer, what, remedy)
            rules_out = self._rules_out_epsilon
            chain.break_link("norm", reason, rules_out_epsilon=rules_out)

        check(layer, args, kwargs, out, found)

    def __reduce__(self) -> tuple[Any, ...]:
        return _InputCheck, ()


def _needs_check(layer: nn.Module) -> bool:
    """Return whether the inputs of a layer matter: not without a padding token."""
    return not isinstance(layer, nn.Embedding) or layer.padding_idx is not None


def _check_bag(
    layer: nn.EmbeddingBag,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    _: Tensor,
    found: Callable[[str, str], None],
) -> None:
    """Check that no token occurs twice in one bag, and that none has a weight."""
    if kwargs.get("per_sample_weights") is not None:
        found("Opacus ignores per_sample_weights", _AS_EMBEDDING)
        return
    offsets = args[1] if len(args) > 1 else None
    if offsets is None or args[0].dim() != 1:
        return  # Opacus raises an error
    tokens = args[0].to(torch.int64)
    starts = torch.zeros(len(tokens) + 1, dtype=torch.int64, device=tokens.device)
    starts.index_add_(0, offsets.to(torch.int64), torch.ones_like(offsets).long())
    # bag and token as one number, of which none may occur twice
    pairs = starts.cumsum(0)[:-1] * layer.num_embeddings + tokens
    if len(pairs.unique()) < len(pairs):
        found(
            "a token occurs twice in one example, and Opacus keeps only one of its "
            "gradients",
            _AS_EMBEDDING,
        )


def _check_padding(
    layer: nn.Embedding,
    args: tuple[Any, ...],
    _: dict[str, Any],
    out: Tensor,
    found: Callable[[str, str], None],
) -> None:
    """Check in the backward pass that no gradient reaches a padding token."""
    is_padding = args[0].detach() == layer.padding_idx

    def check_gradient(gradient: Tensor) -> None:
        reached = (gradient != 0).any(dim=-1)
        if bool((reached & is_padding).any()):
            found(
                "Opacus ignores padding_idx, and the loss depends on the outputs at "
                "padding tokens",
                f"{_OTHER_MODE} Alternatively, mask these outputs.",
            )

    out.register_hook(check_gradient)


def _check_memory_order(
    layer: nn.Conv2d,
    args: tuple[Any, ...],
    _: dict[str, Any],
    __: Tensor,
    found: Callable[[str, str], None],
) -> None:
    """Check that rows of pixels lie behind each other, as Opacus assumes."""
    images = args[0]
    if images.is_contiguous():
        return
    # Opacus reads the padded images, and padding copies them, often in another order
    padded = nn.functional.pad(images.detach(), both_sides_padding(layer))
    if padded.stride()[-2:] != (padded.shape[-1], 1):
        found(
            "Opacus misreads inputs in another memory order, such as channels_last",
            f"{_OTHER_MODE} Alternatively, call make_compatible(model) of "
            "opacus_pi.compatible: it copies inputs into the usual order.",
        )


def _check_packed(
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    __: Any,
    found: Callable[[str, str], None],
) -> None:
    """Check that a packed sequence has the examples in the order of the batch."""
    given = args[0] if args else kwargs.get("input")
    order = given.sorted_indices if isinstance(given, PackedSequence) else None
    if order is None:
        return
    if order.tolist() != list(range(len(order))):
        found(
            "its packed sequences were sorted by length, so its gradients are in the "
            "order of the lengths and those of other layers in the order of the batch",
            "Sort each batch by length in collate_fn, longest first, and call "
            "pack_padded_sequence with enforce_sorted=True.",
        )


_INPUTS: dict[Any, Callable[..., None]] = {
    _Recurrent: _check_packed,
    nn.EmbeddingBag: _check_bag,
    nn.Embedding: _check_padding,
    nn.Conv2d: _check_memory_order,
}

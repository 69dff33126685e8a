"""Find tensors outside of the model that are trained on the loss of the run.

A head on a private encoder, the centres of a centre loss or a learned temperature may
be trained by an optimizer of their own. Their gradients are neither clipped nor noised,
and the next updates of the model depend on what they made of these tensors. So neither
the engine's ε nor the ledger covers the model, also if only the model is published.

In a checked backward pass, autograd's graph is followed from the tensors at which the
pass began. Every leaf that gets a gradient there, and that the private optimizer does
not hold, is noted: its count of writes, its place in memory and a few entries. If the
gradients of the pass enter an update, and the leaf is different later, it is reported.

*Guarantee.* Passes 1, 2, 4, 8, 16 and so on are checked, and every 64th. A leaf that is
in the graph of one of these passes is found if torch counts a write to it, if the
sampled entries change, or if the loop makes it anew with other values in each pass. In
between nothing is done.

*What breaks it.* Whether the change came from these gradients is not known: a schedule
may also change a tensor. So the link is left unchecked, and not broken. Gradients that
are cleared before an update (the generator's step of a GAN) are not judged. If the leaf
of a noted pass is as it was when it gets gradients of a later pass, and has none then,
those of the noted pass were cleared: a generator whose gradients of the discriminator's
loss are cleared before its own step is not reported, unless the loop has copied them
before, which is not seen. On an accelerator this is not recognised, and FSDP is not
seen. The graph of a pass that begins neither in ``torch.autograd.backward`` nor in
``torch.autograd.grad`` cannot be followed; if such a pass is to be checked, the link is
left unchecked. On an accelerator entries are compared when the ledger is read only, so
that training does not wait, and a leaf that is made anew is not found.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from opacus_pi._torch_compat import (
    current_backward_pass,
    num_writes,
    running_node,
    sequence_number,
    starts_of_backward,
)
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.custody.weights import is_plain, sampled_entries
from opacus_pi.integration.held_weights import ids_held_by

__all__ = ["TrainedOutside"]

_TRAINED = (
    "In the backward pass of an update, tensors outside of the model got gradients of "
    "the same loss, and they have changed since. Their shapes are {shapes}. If they "
    "are trained with these gradients, which are neither clipped nor noised, they "
    "depend on single examples, and so do the next updates of the model. Then neither "
    "get_epsilon nor the ledger covers the model, also if only the model is "
    "published. Make these tensors a part of the model before make_private, or keep "
    "them constant (requires_grad_(False)). If they change without training data, "
    "nothing needs to be done."
)
_NOT_FOLLOWED = (
    "A backward pass began neither in torch.autograd.backward nor in "
    "torch.autograd.grad, so the graph of its loss could not be followed. Whether "
    "tensors outside of the model are trained with gradients of the same loss is "
    "therefore not known. If none are, nothing needs to be done. To have it checked, "
    "call loss.backward()."
)
_NUM_SHAPES = 3


@dataclass(eq=False)
class _Leaf:
    """A leaf of autograd's graph at one moment.

    Args:
        reference: Refers to it weakly.
        shape: Its shape.
        writes: How often it was written to.
        address: Of its entries in memory.
        entries: Some of its entries.
        is_later: Whether the loss uses it after the outputs of the model, and not
            before.
        number: The number of the backward pass.
        handle: Removes the hook that looks for its next gradient.
        is_cleared: Whether the gradient was cleared while the leaf was what it is here.
    """

    reference: weakref.ref[Tensor]
    shape: tuple[int, ...]
    writes: int
    address: int
    entries: Tensor
    is_later: bool
    number: int
    handle: RemovableHandle | None = None
    is_cleared: bool = False

    @classmethod
    def of(cls, tensor: Tensor, *, is_later: bool) -> "_Leaf":
        """Note a leaf as it is.

        Args:
            tensor: The leaf.
            is_later: As in the class.
        """
        leaf = cls(
            weakref.ref(tensor),
            tuple(tensor.shape),
            num_writes(tensor),
            tensor.data_ptr(),
            sampled_entries(tensor.detach()).clone(),
            is_later,
            current_backward_pass(),
        )
        if tensor.is_cpu:
            hook = unserializable_hook(_GradientHook(leaf))
            leaf.handle = tensor.register_hook(hook)
        return leaf

    def gets_gradient(self) -> None:
        """Note whether the gradient of the pass was cleared before another is added."""
        tensor = self.reference()
        if tensor is None or current_backward_pass() == self.number:
            return
        self.forget()
        if tensor.grad is None or not tensor.grad.any():
            self.is_cleared = not self.has_changed(waits=True)

    def forget(self) -> None:
        """Remove the hook."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def has_changed(self, *, waits: bool) -> bool:
        """Return whether the leaf exists and is not what it was.

        Args:
            waits: Whether entries on an accelerator are compared.
        """
        tensor = self.reference()
        if tensor is None or self.is_cleared:
            return False
        return (
            num_writes(tensor) != self.writes
            or tensor.data_ptr() != self.address
            or self._differs(sampled_entries(tensor.detach()), waits=waits)
        )

    def was_made_anew(self, others: Iterable["_Leaf"]) -> bool:
        """Return whether another leaf has taken the place of this one.

        Args:
            others: The leaves of a later pass.
        """
        alike = [o for o in others if o.is_later and o.shape == self.shape]
        if not self.is_later or any(o.reference() is self.reference() for o in alike):
            return False
        return any(self._differs(o.entries, waits=False) for o in alike)

    def _differs(self, entries: Tensor, *, waits: bool) -> bool:
        """Return whether these are not the entries that were noted."""
        if not (waits or entries.is_cpu):
            return False
        return not torch.equal(entries, self.entries)


class _GradientHook:
    """Tells a leaf that its tensor is about to get a gradient.

    Copies and pickles do nothing.

    Args:
        leaf: Referred to weakly.
    """

    def __init__(self, leaf: _Leaf | None = None) -> None:
        self._leaf = None if leaf is None else weakref.ref(leaf)

    def __call__(self, gradient: Tensor) -> None:
        """Tell the leaf, if it is still noted."""
        leaf = None if self._leaf is None else self._leaf()
        if leaf is not None:
            leaf.gets_gradient()

    def __reduce__(self) -> tuple[type["_GradientHook"], tuple[()]]:
        return _GradientHook, ()


class TrainedOutside:
    """Looks at some backward passes of a run.

    Args:
        module: The user's module.
        optimizer: What Opacus made of the optimizer; referred to weakly.
        chain: Its link "weights" is left unchecked if such tensors change.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, chain: Chain) -> None:
        self._module: Callable[[], nn.Module | None] = weakref.ref(module)
        self._optimizer: Callable[[], Optimizer | None] = weakref.ref(optimizer)
        self._chain = chain
        self._looks, self._pass = Looks(), -1
        self._pending: list[_Leaf] = []  # of passes that no update has used yet
        self._noted: list[_Leaf] = []
        self._is_told = False
        chain.on_read(self._compare, can_break=False)

    def backward_began(self, *, is_second: bool) -> None:
        """Note the leaves of the backward pass that runs now, if it is to be checked.

        Args:
            is_second: Whether it is the second pass of ghost clipping.
        """
        present = current_backward_pass()
        if is_second or self._is_told or present == self._pass:
            return
        self._pass = present
        if self._looks.count():
            found = self._leaves()
            self._compare(found)
            if not self._is_told:
                self._pending += found

    def gradients_were_cleared(self) -> None:
        """Forget the passes whose gradients no update will use."""
        _forget(self._pending)
        self._pending = []

    def update_was_made(self) -> None:
        """Record that an update has used the gradients of the passes before it."""
        if self._pending:
            _forget(self._noted)
            self._noted, self._pending = self._pending, []

    def _compare(self, present: Sequence[_Leaf] | None = None) -> None:
        """Compare the leaves that were noted with what they are now.

        Args:
            present: The leaves of a pass that runs now; None: the chain is read.
        """
        is_running = present is not None
        with torch.no_grad():
            changed = [
                one
                for one in self._noted
                if one.has_changed(waits=not is_running)
                or one.was_made_anew(present or ())
            ]
        if changed and not self._is_told:
            _forget([*self._noted, *self._pending])
            self._is_told, self._noted, self._pending = True, [], []
            shapes = list(dict.fromkeys(one.shape for one in changed))
            more = ", ..." if len(shapes) > _NUM_SHAPES else ""
            text = ", ".join(map(str, shapes[:_NUM_SHAPES])) + more
            self._chain.leave_unchecked("weights", _TRAINED.format(shapes=text))

    def _leaves(self) -> list[_Leaf]:
        """Return the leaves of the present backward pass that are not the run's.

        The link is left unchecked if the graph of the pass is not known.
        """
        module, optimizer, node = self._module(), self._optimizer(), running_node()
        if module is None or optimizer is None:
            return []
        own = ids_held_by(optimizer) | set(map(id, module.parameters()))
        number = 0 if node is None else sequence_number(node)
        is_later: dict[int, bool] = {}
        leaves: dict[int, Tensor] = {}
        waiting = starts_of_backward()
        seen = set(waiting)
        while waiting:
            one = waiting.pop()
            for following, _ in one.next_functions:
                leaf = getattr(following, "variable", None)
                if leaf is not None and id(leaf) not in own:
                    leaves[id(leaf)] = leaf
                    later = sequence_number(one) > number
                    is_later[id(leaf)] = later and is_later.get(id(leaf), True)
                elif following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        if node not in seen:
            self._chain.leave_unchecked("weights", _NOT_FOLLOWED)
        return [
            _Leaf.of(leaf, is_later=is_later[key])
            for key, leaf in leaves.items()
            if is_plain(leaf) and leaf.numel()
        ]


def _forget(leaves: Iterable[_Leaf]) -> None:
    """Remove the hooks of leaves that are not compared any more."""
    for leaf in leaves:
        leaf.forget()

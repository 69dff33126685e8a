"""What every update really used of every example, and whether the record says so.

The oracle reads from the tensors that entered a backward pass which examples their rows
were made of (``hidden_ids``), and computes the gradient of each row alone, by
``torch.autograd.grad`` on a plain model with the weights of that moment. There is a
right norm for every example if

* each row was made of one example, and no example had two rows in one update;
* the gradient of the batch is the sum of the gradients of the rows alone.

Otherwise no number is right, and the record must refuse or say the cause.
"""

import numpy as np
import torch

from tests.custody.hidden_ids import NUM_EXAMPLES, ids_of_batch
from tests.custody.loops import Pass, apply_criterion

_CLOSE = 2e-4  # relative


class NoTruth(Exception):
    """No norm is right for every example."""


def plain_model(loop, weights):
    """Return a new model with these weights, which no engine has prepared."""
    model = loop.model()
    model.load_state_dict(weights, strict=False)
    return model


def total_loss(loop, model, tensors, scale=1.0):
    """Return the loss whose gradient is the sum over the rows, as Opacus takes it."""
    criterion, targets = loop.criterion(), loop.targets(tensors)
    if loop.mode == "ghost":
        criterion.reduction = "none"
    loss = loop.loss(criterion, loop.forward(model, tensors), targets)
    if loop.mode == "ghost":
        return loss.sum()
    is_mean = loop.private.get("loss_reduction", "mean") == "mean"
    return scale * loss * (len(targets) if is_mean else 1)


def gradient(loop, kept, tensors):
    """Return the gradient for the parameters that the update changes, flattened.

    Args:
        loop: The loop.
        kept: A ``Pass``, with the weights of the moment.
        tensors: Its tensors, or some of their rows.
    """
    model = plain_model(loop, kept.weights)
    named = model.named_parameters()
    held = [p.requires_grad_() for name, p in named if name in kept.trained]
    loss = total_loss(loop, model, tensors, kept.scale)
    grads = torch.autograd.grad(loss, held, allow_unused=True)
    pairs = zip(grads, held, strict=True)
    return torch.cat([(0 * p if g is None else g).flatten() for g, p in pairs]).detach()


def norms_of_pass(loop, kept):
    """Return the norm of each example of one backward pass.

    Raises:
        NoTruth: If a row has several examples, or the rows depend on each other.
    """
    owners = ids_of_batch(kept.tensors)
    if any(len(ids) > 1 for ids in owners):
        raise NoTruth("identity")
    rows = [tuple(t[i : i + 1] for t in kept.tensors) for i in range(len(owners))]
    own = [gradient(loop, kept, row) for row in rows]
    whole = gradient(loop, kept, kept.tensors) if own else None
    if own and not (whole - sum(own)).norm() <= _CLOSE * sum(g.norm() for g in own):
        raise NoTruth("separability")
    if loop.mode == "monitored":  # sweeps measure the criterion, not the loop's loss
        plain = loop.having(loss=apply_criterion)
        swept = sum(gradient(plain, kept, row) for row in rows)
        if own and not (whole - swept).norm() <= _CLOSE * whole.norm():
            raise NoTruth("loss")
    pairs = zip(owners, own, strict=True)  # a row of no example concerns nobody
    named = [(ids.pop(), g.norm().item()) for ids, g in pairs if ids]
    if len(dict(named)) < len(named):
        raise NoTruth("rows")
    return dict(named)


def norms_of_update(loop, passes):
    """Return the norm of each example that one update used.

    Raises:
        NoTruth: As ``norms_of_pass``, or if an example had a row in two passes.
    """
    norms = {}
    for kept in passes:
        found = norms_of_pass(loop, kept)
        if norms.keys() & found.keys():
            raise NoTruth("rows")
        norms |= found
    return norms


def require_same_weights(run):
    """Refuse a run whose weights were written between two updates, or within one.

    Raises:
        NoTruth: If a backward pass was at other weights than the last update left.
    """
    if run.has_harmless_writes:
        return
    for (left, _), passes in zip(run.weights_after, run.updates[1:], strict=False):
        for kept in passes:
            if any(not torch.equal(left[n], w) for n, w in kept.weights.items()):
                raise NoTruth("weights")


def true_norms(run):
    """Return float64 ``(updates, n)``: the norm of each example in each update.

    NaN where an example was not used; instead a word for the reason if no norms are
    right.
    """
    norms = np.full((len(run.updates), NUM_EXAMPLES), np.nan)
    try:
        for row, passes in zip(norms, run.updates, strict=True):
            for k, norm in norms_of_update(run.loop, passes).items():
                row[k] = norm * run.gradient_factor
        require_same_weights(run)
    except NoTruth as reason:
        return str(reason)
    return swept_norms(run) if run.loop.mode in ("swept", "monitored") else norms


def swept_norms(run):
    """Return the norms of all examples of the data set after each update."""
    loop, norms = run.loop, []
    for weights, trained in run.weights_after:
        kept = Pass((), weights, trained)
        items = [run.user_loader.collate_fn([item]) for item in run.data_set]
        norms.append([gradient(loop, kept, tuple(i)).norm().item() for i in items])
    return np.array(norms)


def equal_norms(recorded, truth):
    """Whether the same examples have the same norms in all rows."""
    return recorded.shape == truth.shape and np.allclose(
        recorded, truth, rtol=_CLOSE, atol=1e-6, equal_nan=True
    )

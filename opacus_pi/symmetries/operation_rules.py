"""Rules that say how an operation relates the dimensions of its inputs and outputs.

A rule takes a function from a tensor to its dimensions, the arguments of the operation
by name, and its result. It unifies or fixes atoms and returns the dimensions of the
outputs that it knows. To support another operation, write a rule and enter it under the
name that torch gives the operation (``aten::`` removed) in ``_rules``.

A rule must be right for every argument that the operation can have. If it is unsure, it
fixes the dimension in question: a symmetry is then missed, which is harmless, while a
wrong symmetry changes the network. ``permutation_spec`` applies a random permutation to
each result, so a wrong rule is reported as an error for the models that reveal it.

The models are traced in evaluation mode and without gradients, so there are no rules
for dropout, for the updates of running statistics or for backward operations.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from opacus_pi._torch_compat import pytree
from opacus_pi.symmetries.axes import Atom, Dims, fix, fresh, regroup, unify

DimsOf = Callable[[Tensor], Dims]
Arguments = Mapping[str, Any]
Rule = Callable[[DimsOf, Arguments, Any], list[Dims]]


def pointwise(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Unify the dimensions that broadcasting aligns.

    This serves every operation that torch tags as pointwise (sums, products, activation
    functions, ``where``, ...): entry i of the output depends on entry i of each input.

    Args:
        dims: Dimensions of a tensor.
        given: The arguments; all tensors among them are inputs, in nested lists too.
        result: The output.
    """
    out: Dims = [[] for _ in result.shape]
    for tensor in pytree.tree_leaves(list(given.values())):
        if isinstance(tensor, Tensor):
            _broadcast(out, dims(tensor), tensor, result)
    return [out]


def _broadcast(out: Dims, own: Dims, tensor: Tensor, result: Tensor) -> None:
    """Unify the dimensions of a tensor with those of the broadcast result.

    Args:
        out: Dimensions of the result so far; the tensor's are entered where it is not
            repeated. Dimensions of size 1 that are repeated take no part.
        own: Dimensions of the tensor.
        tensor: An input, aligned with the result at the last dimension.
        result: The output of the operation.
    """
    offset = result.dim() - tensor.dim()
    for i, dim in enumerate(own):
        if tensor.shape[i] == result.shape[i + offset] != 1:
            if out[i + offset]:
                unify(out[i + offset], dim)
            out[i + offset] = dim


def _same(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Return the input's dimensions: copies, casts and softmax.

    A softmax treats every index of its dimension alike: if its inputs are permuted, its
    outputs are permuted in the same way.
    """
    return [dims(given["self"])]


def _view(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Reshapes: the row-major order of the atoms stays.

    Only the distribution over dimensions changes. ``regroup`` splits an atom where a
    boundary cuts it evenly, as when a projection is cut into heads.
    """
    flat = [atom for dim in dims(given["self"]) for atom in dim]
    return [regroup(flat, result.shape)]


def _permute(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``permute``: the dimensions in another order."""
    own = dims(given["self"])
    return [[own[d] for d in given["dims"]]]


def _transpose(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``transpose`` swaps two dimensions; ``t`` swaps the only two.

    ``t`` has no arguments beside the tensor, and leaves tensors with fewer than two
    dimensions as they are.
    """
    own = list(dims(given["self"]))
    i, j = given.get("dim0", 0), given.get("dim1", -1)
    if own:
        own[i], own[j] = own[j], own[i]
    return [own]


def _expand(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """New or expanded dimensions are constant along themselves, hence free.

    All entries along such a dimension are the same, so any permutation of it changes
    nothing. It gets an atom of its own, which other operations may unify with any
    other.
    """
    tensor, out = given["self"], fresh(result.shape)
    offset = result.dim() - tensor.dim()
    for i, dim in enumerate(dims(tensor)):
        if tensor.shape[i] == result.shape[i + offset]:
            out[i + offset] = dim
    return [out]


def _constant(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Constants: no permutation changes them, so all their dimensions are free.

    All entries are equal. ``arange`` is not constant and has no rule, so it is fixed.
    """
    return [fresh(result.shape)]


def _part(dim: list[Atom], length: int, size: int, start: int = 0) -> list[Atom]:
    """Return ``length`` consecutive indices of a dimension.

    If the range is one of several equal blocks, only the order of the blocks is fixed,
    and all blocks share one permutation of the indices within a block. That is the case
    for a joint projection of queries, keys and values. Any other range fixes the whole
    dimension.

    Args:
        dim: Atoms of the whole dimension.
        length: Number of indices to take.
        size: Number of indices of the dimension.
        start: The first index to take, not negative.
    """
    if length == size:
        return dim
    if size % length == 0 and start % length == 0:
        outer, inner = regroup(dim, (size // length, length))
        fix([outer])
        return inner
    fix([dim])
    return fresh([length], fixed=True)[0]


def _slice(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``slice``: a range of one dimension.

    Torch gives a start that counts from the end as a negative number. A step other than
    1 takes indices that are no block, so the dimension is fixed.
    """
    tensor, d = given["self"], given["dim"]
    own, size, length = list(dims(tensor)), tensor.shape[d], result.shape[d]
    start = given["start"] or 0
    if given["step"] != 1:
        fix([own[d]])
        start = 1
    if length == 0:
        return [fresh(result.shape, fixed=True)]
    own[d] = _part(own[d], length, size, start + size if start < 0 else start)
    return [own]


def _split(dims: DimsOf, given: Arguments, result: list[Tensor]) -> list[Dims]:
    """``split``: consecutive ranges of one dimension."""
    tensor, d, outputs, start = given["self"], given["dim"], [], 0
    for piece in result:
        own = list(dims(tensor))
        own[d] = _part(own[d], piece.shape[d], tensor.shape[d], start)
        start += piece.shape[d]
        outputs.append(own)
    return outputs


def _select(dims: DimsOf, given: Arguments, result: Any) -> list[Dims]:
    """``select`` takes one index of a dimension, ``unbind`` each: its order matters."""
    own = list(dims(given["self"]))
    fix([own.pop(given["dim"])])
    return [own] if isinstance(result, Tensor) else [own] * len(result)


def _cat(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``cat``: the order of the joined dimension matters, the others are unified.

    The parts could still be permuted within themselves. This is not traced, because
    an atom describes a whole dimension or a factor of it, never a range. Networks that
    concatenate features (DenseNet, U-Net) therefore have fewer symmetries here than in
    truth. Empty tensors of one dimension, which torch skips, are skipped as well.
    """
    tensors = [t for t in given["tensors"] if t.dim() == result.dim()]
    d = given["dim"] % result.dim()
    out = list(dims(tensors[0]))
    for tensor in tensors:
        own = dims(tensor)
        fix([own[d]])
        for i in range(result.dim()):
            if i != d:
                unify(out[i], own[i])
    out[d] = fresh([result.shape[d]], fixed=True)[0]
    return [out]


def _stack(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``stack``: the order of the new dimension matters, the others are unified.

    The new dimension lists the tensors, and each of them has its own meaning.
    """
    first, *others = [dims(tensor) for tensor in given["tensors"]]
    for own in others:
        for left, right in zip(first, own, strict=True):
            unify(left, right)
    out = list(first)
    d = given["dim"] % result.dim()
    out.insert(d, fresh([result.shape[d]], fixed=True)[0])
    return [out]


def _contract(a: Dims, b: Dims) -> Dims:
    """Return the dimensions of a matrix product, after unifying the contracted ones.

    The product sums over the contracted dimension, so it stays the same if both factors
    are permuted alike there. Batch dimensions are paired, not summed.

    Args:
        a: Dimensions of the first factor, ``(..., m, k)``.
        b: Dimensions of the second factor, ``(..., k, n)``.

    Returns:
        Dimensions of the product, ``(..., m, n)``.
    """
    unify(a[-1], b[-2])
    for left, right in zip(a[:-2], b[:-2], strict=True):
        unify(left, right)
    return [*a[:-1], b[-1]]


def _matmul(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``mm``, ``bmm``: a matrix product."""
    return [_contract(dims(given["self"]), dims(given["mat2"]))]


def _addmm(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """``addmm``, ``baddbmm``: a matrix product plus a bias, which is broadcast.

    Torch names the factors ``mat1`` and ``mat2``, or ``batch1`` and ``batch2``.
    """
    first = given.get("mat1", given.get("batch1"))
    second = given.get("mat2", given.get("batch2"))
    out = _contract(dims(first), dims(second))
    bias = given["self"]
    _broadcast(out, dims(bias), bias, result)
    return [out]


def _convolution(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Convolutions; grouped channels are (group, channel within the group).

    The input is ``(b, channels, *places)``. The weight is ``(out, in / groups,
    *kernel)``, of a transposed convolution ``(in, out / groups, *kernel)``. The order
    of the places and of the kernel's entries matters, because a kernel mixes
    neighbours.
    """
    x, weight = list(dims(given["input"])), dims(given["weight"])
    fix([*x[2:], *weight[2:]])
    groups = given["groups"]
    channels = given["input"].shape[1]
    group, inside = regroup(x[1], (groups, channels // groups))
    if given["transposed"]:
        unify(x[1], weight[0])
        out = [*group, *weight[1]]
    else:
        per_group = given["weight"].shape[0] // groups
        unify(group, regroup(weight[0], (groups, per_group))[0])
        unify(inside, weight[1])
        out = weight[0]
    if given["bias"] is not None:
        unify(out, dims(given["bias"])[0])
    return [[x[0], out, *fresh(result.shape[2:], fixed=True)]]


def _batch_norm(dims: DimsOf, given: Arguments, result: Any) -> list[Dims]:
    """Batch normalization: each channel has its own statistics, weight and bias.

    Channels are dimension 1. Only the first of the operation's outputs is returned. The
    others are saved statistics, which the model does not use.
    """
    x = dims(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            unify(x[1], dims(given[name])[0])
    return [x]


def _layer_norm(dims: DimsOf, given: Arguments, result: Any) -> list[Dims]:
    """Layer normalization: statistics do not depend on the order of what they cover.

    They cover the last dimensions, as many as the weight has. Only the first of the
    outputs is returned, as in ``_batch_norm``.
    """
    x = dims(given["input"])
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            own = dims(given[name])
            for left, right in zip(x[-len(own) :], own, strict=True):
                unify(left, right)
    return [x]


def _group_norm(dims: DimsOf, given: Arguments, result: Any) -> list[Dims]:
    """Group normalization: channels move within their group, and groups as a whole.

    ``regroup`` splits the atom of the channels, so that each group may get its own
    permutation of the channels within it.
    """
    x = dims(given["input"])
    groups, channels = given["group"], given["input"].shape[1]
    regroup(x[1], (groups, channels // groups))
    for name in ("weight", "bias"):
        if given[name] is not None:
            unify(x[1], dims(given[name])[0])
    return [x]


def _embedding(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Embeddings: the vocabulary is fixed, the width is free.

    The data name the rows of the table by number, so the rows have to stay in order.
    """
    vocabulary, width = dims(given["weight"])
    fix([vocabulary])
    return [[*dims(given["indices"]), width]]


def _reduce(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Reductions: a mean, sum or maximum does not depend on the order.

    A reduced dimension is therefore not fixed. Its argument may be one number, a list,
    or missing; then all dimensions are reduced.
    """
    own, d = dims(given["self"]), given.get("dim")
    gone = [d] if isinstance(d, int) else d
    gone = {i % len(own) for i in gone} if gone else set(range(len(own)))
    if given.get("keepdim"):
        return [[[] if i in gone else dim for i, dim in enumerate(own)]]
    return [[dim for i, dim in enumerate(own) if i not in gone]]


def _spatial(num_dims: int) -> Rule:
    """Return the rule for pooling and resizing of the last dimensions.

    Both combine neighbours, so the order in these dimensions matters before and after.
    Channels pass through. Max pooling also returns the places of the maxima; only the
    first output gets dimensions.

    Args:
        num_dims: How many dimensions are pooled or resized, 2 or 3.
    """

    def rule(dims: DimsOf, given: Arguments, result: Any) -> list[Dims]:
        own = dims(given["self"])
        fix(own[-num_dims:])
        first = result if isinstance(result, Tensor) else result[0]
        return [[*own[:-num_dims], *fresh(first.shape[-num_dims:], fixed=True)]]

    return rule


def _pad(dims: DimsOf, given: Arguments, result: Tensor) -> list[Dims]:
    """Padding: a padded dimension is fixed.

    ``pad`` lists pairs (before, after), beginning with the last dimension. A pair of
    zeros pads nothing, so that dimension stays free.
    """
    own, pad = list(dims(given["self"])), given["pad"]
    for k in range(len(pad) // 2):
        if pad[2 * k] or pad[2 * k + 1]:
            fix([own[-1 - k]])
            own[-1 - k] = fresh([result.shape[-1 - k]], fixed=True)[0]
    return [own]


def _rules() -> dict[str, Rule]:
    """Return the table of rules by the names of the operations.

    It is written by rule, so that one line shows everything a rule must be right for.
    Operations that only decompose into these (linear layers, attention) are not listed:
    torch dispatches their parts.
    """
    names: dict[Rule, str] = {
        _same: "clone detach alias _to_copy lift_fresh _softmax _log_softmax "
        "_safe_softmax",
        pointwise: "copy",
        _view: "view _unsafe_view _reshape_alias unsqueeze squeeze",
        _permute: "permute",
        _transpose: "transpose t",
        _expand: "expand",
        _constant: "zeros ones full zeros_like ones_like full_like new_zeros new_ones "
        "new_full scalar_tensor",
        _slice: "slice",
        _split: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
        _select: "select unbind",
        _cat: "cat",
        _stack: "stack",
        _matmul: "mm bmm",
        _addmm: "addmm baddbmm",
        _convolution: "convolution",
        _batch_norm: "native_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_no_training",
        _layer_norm: "native_layer_norm _fused_rms_norm",
        _group_norm: "native_group_norm",
        _embedding: "embedding",
        _reduce: "mean sum amax amin var std logsumexp linalg_vector_norm",
        _spatial(2): "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d",
        _spatial(3): "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d",
        _pad: "constant_pad_nd",
    }
    return {name: rule for rule, listed in names.items() for name in listed.split()}


RULES = _rules()

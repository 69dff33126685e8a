"""Every layer of ``torch.nn`` that has parameters: how its gradients are obtained.

    python -m tests.gradients.layer_table  # writes the table into docs/how-to/layers.md

The layers are those that ``torch.nn`` lists, so that a layer of a later torch appears
by itself: either it can be constructed with whole numbers and has no parameters, or it
needs an entry in ``CASES``. What the table says is what the layer was seen to do.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.gradients.layers.recurrent import is_recurrent
from opacus_pi.gradients.layers.registry import layer_rule
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "layers.md"
LOSSES = nn.CrossEntropyLoss(reduction="none")
B, T, D = 6, 5, 4  # examples, steps, features
RULE = "exact rule"
GENERAL = "each example's gradients, by `torch.func`"
ALONE = "one example after the other"
REFUSED = "refused by Opacus"
FAILS = "`step()` raises an error"
Case = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def first_output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def twice_given(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x)


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def looked_up(layer: nn.Module, x: Tensor) -> Tensor:
    return layer((4 * x.sigmoid()).long())


def twice_stepped(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, layer(x))


def by_dims(name: str, *sizes: int, **options: bool) -> dict[str, Callable[[], Case]]:
    """Return the layers of one, two and three dimensions, on ``(b, 4, 5, ...)``."""
    return {
        f"{name}{dims}d": partial(of_dims, name, dims, sizes, options)
        for dims in (1, 2, 3)
    }


def of_dims(
    name: str, dims: int, sizes: tuple[int, ...], options: dict[str, bool]
) -> Case:
    """Return a layer, how to use it, and the shape of an example."""
    layer = getattr(nn, f"{name}{dims}d")(*sizes, **options)
    return layer, plainly, (D, *[T] * dims)


SEQUENCE, VECTOR = (T, D), (D,)
# How to make and use each layer that has parameters
CASES: dict[str, Callable[[], Case]] = {
    "Bilinear": lambda: (nn.Bilinear(D, D, 3), twice_given, VECTOR),
    "Embedding": lambda: (nn.Embedding(5, D), looked_up, (T,)),
    "EmbeddingBag": lambda: (nn.EmbeddingBag(5, D), looked_up, (T,)),
    "GRU": lambda: (nn.GRU(D, 3, batch_first=True), first_output, SEQUENCE),
    "GRUCell": lambda: (nn.GRUCell(D, 3), twice_stepped, VECTOR),
    "GroupNorm": lambda: (nn.GroupNorm(2, D), plainly, (D, T)),
    "LSTM": lambda: (nn.LSTM(D, 3, batch_first=True), first_output, SEQUENCE),
    "LSTMCell": lambda: (nn.LSTMCell(D, 3), first_output, VECTOR),
    "LayerNorm": lambda: (nn.LayerNorm(D), plainly, SEQUENCE),
    "Linear": lambda: (nn.Linear(D, 3), plainly, VECTOR),
    "MultiheadAttention": lambda: (
        nn.MultiheadAttention(D, 2, batch_first=True),
        attended,
        SEQUENCE,
    ),
    "PReLU": lambda: (nn.PReLU(D), plainly, (D, T)),
    "RMSNorm": lambda: (nn.RMSNorm(D), plainly, SEQUENCE),
    "RNN": lambda: (nn.RNN(D, 3, batch_first=True), first_output, SEQUENCE),
    "RNNCell": lambda: (nn.RNNCell(D, 3), twice_stepped, VECTOR),
    "SyncBatchNorm": lambda: (nn.SyncBatchNorm(D), plainly, (D, T)),
    "Transformer": lambda: (
        nn.Transformer(D, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        twice_given,
        SEQUENCE,
    ),
    "TransformerDecoder": lambda: (
        nn.TransformerDecoder(decoder_layer(), 1),
        twice_given,
        SEQUENCE,
    ),
    "TransformerDecoderLayer": lambda: (decoder_layer(), twice_given, SEQUENCE),
    "TransformerEncoder": lambda: (
        nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False),
        plainly,
        SEQUENCE,
    ),
    "TransformerEncoderLayer": lambda: (encoder_layer(), plainly, SEQUENCE),
    **by_dims("Conv", D, 3, 2),
    **by_dims("ConvTranspose", D, 3, 2),
    **by_dims("BatchNorm", D),
    **by_dims("InstanceNorm", D, affine=True),
}


# Modules that are not layers with one output for each example, and why.
NOT_LAYERS = {
    "RNNBase": "the base class of recurrent layers; has no `forward`",
    "RNNCellBase": "the base class of recurrent cells; has no `forward`",
    "AdaptiveLogSoftmaxWithLoss": "computes the loss itself",
    "LinearCrossEntropyLoss": "computes the loss itself",
    "ModuleDict": "holds other layers",
    "ModuleList": "holds other layers",
    "ParameterDict": "holds parameters, which are used outside of layers",
    "ParameterList": "holds parameters, which are used outside of layers",
    "Sequential": "holds other layers",
}
# Layers without parameters whose arguments are not just whole numbers
WITHOUT_PARAMETERS = {"FractionalMaxPool2d", "FractionalMaxPool3d", "Unflatten"}


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)


def decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(D, 2, 8, dropout=0.0, batch_first=True)


def names_of_layers() -> Iterator[str]:
    """Yield the public modules of torch.nn that have, or may have, parameters."""
    for name in sorted(vars(nn)):
        module_type = getattr(nn, name)
        if name.startswith("_") or not inspect.isclass(module_type):
            continue
        is_known_otherwise = name in WITHOUT_PARAMETERS or module_type is nn.Module
        if issubclass(module_type, nn.Module) and not is_known_otherwise:
            if name in CASES or may_have_parameters(module_type):
                yield name


def may_have_parameters(module_type: type[nn.Module]) -> bool:
    """Return whether a module made with whole numbers has parameters, or fails."""
    required = [
        p
        for p in inspect.signature(module_type).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = module_type(*[4] * len(required))
    except (TypeError, ValueError):
        return True
    return next(module.parameters(), None) is not None


def becomes(name: str) -> str | None:
    """Return the name of the class that a lazy layer becomes in its first pass."""
    made = getattr(getattr(nn, name), "cls_to_become", None)
    return made and made.__name__


class Net(nn.Module):
    """A layer between others, so that it is neither first nor last."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.use, shape = CASES[name]()
        self.shape = shape
        has_gradient = self.use is not looked_up
        self.before = nn.Linear(shape[-1], shape[-1]) if has_gradient else nn.Identity()
        with torch.no_grad():
            self.layer.eval()
            size = self.used(torch.randn(B, *shape)).flatten(1).shape[1]
        self.layer.train()
        self.head = nn.Linear(size, 3)

    def used(self, x: Tensor) -> Tensor:
        return self.use(self.layer, self.before(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.used(x)).flatten(1))


def batch_of(net: Net) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, *net.shape), torch.arange(B) % 3


def in_sweeps(name: str) -> tuple[str, Tensor, Net]:
    """Return how a sweep measures a layer, the norms, and the model."""
    net = Net(name)
    x, y = batch_of(net)
    with isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = NormEngine(net, LOSSES)
        squares, _ = engine.squares(x, y)
    own = {n for n, _ in net.named_parameters() if n.startswith("layer.")}
    way = RULE
    if own & engine._taps.leftover:
        way = GENERAL if engine._vectorised else ALONE
    return way, squares.sqrt(), net


def in_fast_mode(name: str) -> tuple[str, Tensor | None, Net]:
    """Return how the fast mode trains a layer, the norms, and the model.

    The norms are ``None`` where it does not.
    """
    net = Net(name)
    way = RULE if has_rules(net.layer) else GENERAL  # the hooks of training hide rules
    x, y = batch_of(net)
    try:
        prepared, optimizer, _ = PrivacyEngine().make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=B),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="fast",
        )
    except UnsupportedModuleError:
        return REFUSED, None, net
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LOSSES(prepared(x), y).mean().backward()
        try:
            optimizer.step()
        except ValueError:
            return FAILS, None, net
    is_slow = any("which is slow" in str(w.message) for w in caught)
    return (GENERAL if is_slow else way), optimizer.per_sample_gradient_norms, net


def has_rules(layer: nn.Module) -> bool:
    """Return whether each parameter belongs to a layer that has a rule."""
    return all(
        is_recurrent(module) or layer_rule(module) is not None
        for module in layer.modules()
        if next(module.parameters(recurse=False), None) is not None
    )


def rows() -> dict[str, str]:
    """Return the rows of the table, by layer."""
    found = {}
    for name in names_of_layers():
        if name in NOT_LAYERS:
            found[name] = f"| `{name}` | {NOT_LAYERS[name]} | |"
        elif becomes(name) is None:
            ways = in_sweeps(name)[0], in_fast_mode(name)[0]
            found[name] = f"| `{name}` | {ways[0]} | {ways[1]} |"
    return found


def written() -> dict[str, str]:
    """Return the rows on the page, by layer."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


def main() -> None:
    """Write the table into the page, in place of its rows."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
    rest = [line for line in lines[first:] if not line.startswith("| `")]
    text = "\n".join([*lines[:first], *rows().values(), *rest])
    PAGE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Small networks of the common kinds, with values that tell all units apart."""

import torch
from torch import nn


def mlp():
    return nn.Sequential(
        nn.Linear(5, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 7), nn.Linear(7, 3)
    ), torch.randn(40, 5)


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 10),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(10, 3),
    ), torch.randn(8, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = norm(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = norm(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm(fan_out)
            )

    def forward(self, x):
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


def resnet18(norm):
    layers, width = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), norm(8), nn.ReLU()], 8
    for stage, stride in enumerate((1, 2, 2, 2)):
        for k in range(2):
            fan_out = 8 * 2**stage
            layers.append(Block(width, fan_out, stride if k == 0 else 1, norm))
            width = fan_out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(*layers, *head), torch.randn(3, 3, 16, 16)


def resnet18_bn():
    return resnet18(nn.BatchNorm2d)


def resnet18_gn():
    return resnet18(lambda channels: nn.GroupNorm(4, channels))


class ViT(nn.Module):
    def __init__(self, width=24, heads=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 32, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.encoder(x + self.positions)[:, 0])


def vit():
    return ViT(), torch.randn(6, 3, 8, 8)


class Attention(nn.Module):
    """Separate projections; one norm weight shared by all heads if asked for."""

    def __init__(self, shared_norm, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width // heads) if shared_norm else nn.Identity()
        self.head = nn.Linear(width, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        b, n, width = x.shape

        def heads(y):
            return y.view(b, n, self.heads, -1).transpose(1, 2)

        q, k, v = self.norm(heads(self.q(x))), heads(self.k(x)), heads(self.v(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(b, n, width)))


def attention():
    return Attention(shared_norm=False), torch.randint(0, 11, (5, 7))


def shared_norm_attention():
    return Attention(shared_norm=True), torch.randint(0, 11, (5, 7))


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.SiLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.GELU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 2),
    ), torch.randn(10, 2, 8, 8)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def lstm():
    return Recurrent(), torch.randint(0, 20, (9, 5))


NETWORKS = [
    mlp,
    vgg,
    resnet18_bn,
    resnet18_gn,
    vit,
    attention,
    shared_norm_attention,
    grouped,
    lstm,
]


def build(make, seed=0):
    """A network with random norm weights and statistics, and a batch of inputs."""
    torch.manual_seed(seed)
    model, inputs = make()
    for module in model.modules():
        if hasattr(module, "running_var") or isinstance(
            module, (nn.GroupNorm, nn.LayerNorm)
        ):
            for tensor in (*module.parameters(False), *module.buffers(False)):
                if tensor.is_floating_point():
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval(), inputs

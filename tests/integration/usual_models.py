"""Models as people train them with Opacus: recurrent with attention, convolutional."""

import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn

WIDTH = 6


class Recurrent(nn.Module):
    """Three classes of sequences of the tokens 0 to 6."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.lstm = DPLSTM(WIDTH, WIDTH, batch_first=True, num_layers=2)
        self.attend = DPMultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        states, _ = self.lstm(self.embed(x))
        return self.head(self.attend(states, states, states)[0].mean(1))


class Convolutional(nn.Module):
    """Three classes of images of 2 x 3 pixels, given as rows of six numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        shaped = self.conv(x.view(-1, 1, 2, 3))
        return self.head(torch.relu(self.norm(shaped)).flatten(1))

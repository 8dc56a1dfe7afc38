"""What gives a prompt or prefix while it is trained, and is folded away into it afterwards."""

from __future__ import annotations

import torch
from torch import nn


class MLP(nn.Module):
    """E (n, d) through layers of the ``widths``, with a non-linearity between them."""

    def __init__(self, *widths: int, activation: str = "relu", **like):
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out, **like) for d_in, d_out in pairs)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = getattr(torch, self.activation)(layer(x))
        return self.layers[-1](x)


class LSTM(nn.Module):
    """x (n, d) -> (n, 2 h): a long short-term memory that reads a sequence in both directions.

    torch's own can be neither compiled into one graph nor differentiated twice.
    """

    def __init__(self, d: int, h: int, layers: int = 2, **like):
        super().__init__()
        self.h = h
        sizes = [(width, way) for width in (d, *(2 * h,) * (layers - 1)) for way in range(2)]
        self.inputs = nn.ModuleList(nn.Linear(width, 4 * h, **like) for width, _ in sizes)
        self.states = nn.ModuleList(nn.Linear(h, 4 * h, **like) for _ in sizes)
        for p in self.parameters():
            nn.init.uniform_(p, -(h**-0.5), h**-0.5)  # as torch's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(0, len(self.inputs), 2):
            x = torch.cat((self.read(x, i), self.read(x.flip(0), i + 1).flip(0)), -1)
        return x

    def read(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """The states (n, h) of the i-th reader."""
        given, states = self.inputs[i](x), []
        state = cell = x.new_zeros(self.h)
        for row in given:
            enter, forget, new, leave = (row + self.states[i](state)).chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states)


class Encoded(nn.Module):
    """A prompt (l, d) that ``encoder`` makes of trained inputs E (l, d)."""

    def __init__(self, length: int, d: int, encoder: nn.Module, **like):
        super().__init__()
        self.E = nn.Parameter(torch.randn(length, d, **like))
        self.encoder = encoder

    @property
    def length(self) -> int:
        return len(self.E)

    def forward(self, rows: int = 1) -> torch.Tensor:
        return self.encoder(self.E)

"""The exercises of notebooks/additive/adapterdrop.ipynb."""

import functools

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="An adapter acts where n is at most its layer. The backward pass runs through the layers from n up.",
    inputs=[(0, 12, 11), (3, 6, 5), (11, 12, 11), (5, 8, 2)],
)
def drawn(layer, L, N):
    """By going through all n."""
    acts = sum(layer >= n for n in range(N + 1))
    return acts / (N + 1), sum(L - n for n in range(N + 1)) / (N + 1)


class _Block:
    """A frozen layer; a bare one refuses to run twice."""

    def __init__(self, W: torch.Tensor, bare: bool):
        self.W, self.bare, self.ran = W, bare, False

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        if self.bare and self.ran:
            raise RuntimeError("a bare layer runs twice")
        self.ran = True
        return h + torch.tanh(h @ self.W.T)


def _blocks(n: int) -> tuple:
    x, W, down, up = draw((5, 6), (4, 6, 6), (3, 4, 2, 6), (3, 4, 6, 2))
    return x, [_Block(matrix, layer < n) for layer, matrix in enumerate(W)], down, up, n


@exercise(
    hint="Go up to layer n with x alone. Then give each task a copy, and let a product for each task do the "
    "rest: down[:, layer] is (k, r, d).",
    inputs=[_blocks(n) for n in (2, 0, 3)],
    tolerance=1e-4,
)
def shared(x, blocks, down, up, n):
    """Task by task, from where they part."""
    for block in blocks[:n]:
        x = block(x)
    found = []
    for task in range(len(down)):
        h = x
        for layer in range(n, len(blocks)):
            h = blocks[layer](h)
            h = h + torch.relu(h @ down[task, layer].T) @ up[task, layer].T
        found.append(h)
    return torch.stack(found)


@exercise(
    hint="With u = tokens * d: attention keeps q, k, v and its output, a norm its input, GELU its input, "
    "four times as wide, and the adapter what it reads. The rest is small: statistics, and r.",
    inputs=[(64, 384, 12, 48), (32, 384, 12, 4)],
)
def bytes_per_layer(tokens, d, heads, r):
    return _measured(tokens, r)


@functools.cache
def _measured(tokens: int, r: int) -> int:
    """What one layer of MiniLM (d = 384, 12 heads) adds to the saved activations."""
    top, two = (gl.AdapterDrop(gl.PfeifferAdapter(r=r), drop=n) for n in (5, 4))
    return more_saved(top, two, rows=tokens // 16, length=16)

"""The exercises of notebooks/additive/p_tuning.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="With P = E W and the gradient G of P, the gradient of E is G W^T. And that of W? Both move.",
    inputs=[(*draw((4, 6), (6, 6), (4, 6)), lr) for lr in (0.01, 0.1, 1.0)],
    tolerance=1e-4,
)
def step(E, W, G, lr):
    """P after one step of SGD on both factors."""
    return E @ W - lr * (G @ W.T @ W + E @ E.T @ G) + lr**2 * G @ W.T @ E.T @ G


@exercise(
    hint="The second reader gets the rows in reverse, so its answers come in reverse as well.",
    inputs=[draw((n, 3), (3, 3), (3, 3)) for n in (1, 2, 5)],
    tolerance=1e-5,
)
def read(x, W, V):
    """What two readers know at each row, (n, 2 d): one comes from the front, the other from the back."""
    n = len(x)
    front, back = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(n):
        front[t] = torch.tanh(x[t] + (W @ front[t - 1] if t else 0))
    for t in reversed(range(n)):
        back[t] = torch.tanh(x[t] + (V @ back[t + 1] if t < n - 1 else 0))
    return torch.cat((front, back), 1)


@exercise(
    hint="A layer keeps its input for the gradient of its weight, unless that is a parameter, which is there "
    "anyway. How many texts does the network read?"
)
def kept():
    """Measured: by how many bytes more autograd keeps for a network of linear layers than for a prompt."""
    methods = (gl.PromptTuning(length=20), gl.PTuning(length=20, encoder="mlp"))
    return more_saved(*methods, backbone="tiny-t5", task="modern-bible", rows=32, length=8)

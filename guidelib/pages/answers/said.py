"""The exercises of notebooks/reparametrization/said.ipynb."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise
from guidelib.reparametrization.fastfood import Fastfood, hadamard


@exercise(
    hint="theta = theta_0 + P theta_d, so the gradient of theta_d is P^T g. And what does a step "
    "of theta_d do to theta?",
    inputs=[(*draw((6, 2), (6,)), 0.5), (*draw((5, 5), (5,)), 0.1)],
    tolerance=1e-5,
)
def change(P, g, lr):
    """By how much a step of SGD on theta_d moves theta."""
    theta_d = torch.zeros(P.shape[1], requires_grad=True)
    ((P @ theta_d) @ g).backward()  # a loss whose gradient at theta is g
    return P @ (-lr * theta_d.grad)


@exercise(
    hint="H_2n has the blocks H_n, H_n and H_n, -H_n. So transform the sum and the difference of the halves.",
    inputs=[draw((n,)) for n in (1, 2, 8, 64)],
    tolerance=1e-4,
)
def transform(x):
    return hadamard(len(x)) @ x


@exercise(
    hint="A product with a matrix of R x R costs 2 R FLOPs for each number. The short transform has "
    "32,768 numbers, the long one 262,144. Into which radixes of at most 16 do they fall apart?"
)
def flops():
    """Measured: of P theta_d for a tensor of 384 x 384 entries and 20,000 numbers."""
    project = Fastfood(384**2, 20_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        project(torch.zeros(20_000))
    return counter.get_total_flops()

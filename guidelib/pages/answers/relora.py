"""The exercises of notebooks/reparametrization/relora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import difference
from guidelib.pages.exercises import exercise


@exercise(
    hint="Take A out of the sum of the B A. Can you still, if each cycle has another A?",
    inputs=[(3, 2, 24, 32, False), (3, 2, 24, 32, True), (5, 8, 24, 32, True), (0, 4, 6, 9, True)],
)
def bound(n, r, d_out, d_in, new):
    """Measured: the rank of a sum of random products."""
    generator = torch.Generator().manual_seed(0)
    shape, update = (r, d_in), torch.zeros(d_out, d_in, dtype=torch.float64)
    A = torch.randn(shape, generator=generator, dtype=torch.float64)
    for _ in range(n + 1):
        update += torch.randn(d_out, r, generator=generator, dtype=torch.float64) @ A
        if new:
            A = torch.randn(shape, generator=generator, dtype=torch.float64)
    return int(torch.linalg.matrix_rank(update))


@exercise(
    hint="How many steps have passed since the last restart? In the first cycle there was none.",
    inputs=[(step, 40, restarts, 0.4) for restarts in (1, 3) for step in (0, 1, 9, 10, 12, 20, 21, 39)],
)
def teeth(step, total, restarts, warmup):
    return gl.ReLoRA(restarts=restarts, warmup=warmup).lr_factor(step, total)


@exercise(
    hint="Per path, a rank more is d_in + d_out trained numbers, each with a gradient and two moments, and "
    "one number that is kept for each token. There are 12 paths."
)
def more():
    """Measured: bytes of gradients, moments and activations, LoRA of rank 32 against ReLoRA of rank 8."""

    def held(model):
        cost = gl.measure(model, gl.token_batch(model, 8, 32))
        return cost.gradient_bytes + cost.optimizer_bytes + cost.saved_bytes

    return difference(held, gl.ReLoRA(r=8, targets=("q", "v"), restarts=3), gl.LoRA(r=32))

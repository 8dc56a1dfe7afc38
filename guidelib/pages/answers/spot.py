"""The exercises of notebooks/additive/spot.ipynb."""

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


def _draw(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor + 0.5 for tensor in draw(*shapes))


@exercise(
    hint="A cosine is a product of two vectors of length 1. What is the sum of all products of a's with b's?",
    inputs=[_draw((4, 6), (4, 6)), _draw((3, 8), (5, 8))],
    tolerance=1e-5,
)
def pairs(P, Q):
    """The mean cosine over all pairs, one by one."""
    return torch.stack([F.cosine_similarity(p, q, dim=0) for p in P for q in Q]).mean()


@exercise(
    hint="The weights are the k largest cosines, divided by their sum.",
    inputs=[(*_draw((5, 3, 4), (3, 4)), k) for k in (1, 2, 5)],
    tolerance=1e-5,
)
def mixture(sources, target, k):
    """The mean of the k sources that are most like the target, weighted by how alike they are."""
    alike = [float(F.cosine_similarity(source.mean(0), target.mean(0), dim=0)) for source in sources]
    best = sorted(range(len(sources)), key=lambda i: -alike[i])[:k]
    return sum(alike[i] / sum(alike[j] for j in best) * sources[i] for i in best)


@exercise(hint="Of 400 products of the vectors, 380 are zero. And the rest?")
def turned():
    """Measured: both similarities of 20 vectors at right angles, and of the same with ten turned round."""
    P = torch.eye(20)
    Q = P * (1 - 2 * (torch.arange(20) < 10).float())[:, None]
    return [float(gl.prompt_similarity([P, Q], pairs=pairs)[0, 1]) for pairs in (False, True)]

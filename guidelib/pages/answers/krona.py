"""The exercises of notebooks/reparametrization/krona.ipynb."""

from unittest.mock import patch

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise
from guidelib.reparametrization.krona import Kronecker


@exercise(
    hint="An entry of B stands in every block, each time with another entry of A in front. "
    "So its gradient is a sum over the blocks of G.",
    inputs=[(*draw((6, 10), (2, 5)), 2.0, 0.1), (*draw((12, 6), (3, 2)), 0.5, 1.0)],
    tolerance=1e-5,
)
def first_step(G, A, s, lr):
    """What the first step of SGD adds to the weight, from B = 0."""
    B = torch.zeros(G.shape[0] // A.shape[0], G.shape[1] // A.shape[1], requires_grad=True)
    (G * (s * torch.kron(A, B))).sum().backward()
    return s * torch.kron(A, -lr * B.grad)


@exercise(
    hint="Take the first singular triple of blocks_as_rows(target, o1, i1). Its left vector is A, its right "
    "vector is B, each read row by row.",
    inputs=[(*draw((8, 15)), 2, 3), (*draw((16, 16)), 4, 4), (*draw((6, 4)), 6, 1)],
    tolerance=1e-4,
)
def nearest(target, o1, i1):
    """The Kronecker product nearest to the target: of all its blocks, the one pattern that fits best."""
    (d_out, d_in), A = target.shape, torch.ones(o1, i1)
    blocks = target.reshape(o1, d_out // o1, i1, d_in // i1)
    for _ in range(500):  # each factor in turn, the other one fixed
        B = torch.einsum("oi,opik->pk", A, blocks) / A.square().sum()
        A = torch.einsum("pk,opik->oi", B, blocks) / B.square().sum()
    return torch.kron(A, B)


@exercise(
    hint="A @ Z needs Z for the gradient of A. Which shape has Z = X B^T, for how many tokens and weights?"
)
def kept():
    """Measured: by how many bytes more autograd keeps if X B^T is not made again, on 8 x 32 tokens."""

    def plain(self, x):
        X = x.unflatten(-1, (self.A.shape[1], self.B.shape[1]))
        return self.scale * (self.A @ (X @ self.B.T)).flatten(-2)

    again = more_saved(gl.HeadOnly(), gl.KronA())
    with patch.object(Kronecker, "forward", plain):
        return more_saved(gl.HeadOnly(), gl.KronA()) - again

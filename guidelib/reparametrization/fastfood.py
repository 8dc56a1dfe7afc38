"""Fastfood - a random projection that is fast and small.  Le, Sarlos and Smola 2013, arXiv:1408.3060.

    P = S H G Pi H B        R^d -> R^D,  cut from n x n,  n the smallest power of two >= max(d, D)

B: random signs.  H: the Walsh-Hadamard matrix, of +1 and -1, with H H = n I.  Pi: a random permutation.  G:
a Gaussian diagonal.  S = 1 / sqrt(D sum g^2), so that the columns of P have length 1 on average, and each
row of all n columns has sqrt(n / D).  Time O(n log n) for the second H; memory two numbers for each of the n
rows, as below.

The first H meets a vector that is zero after its first d entries.  H_n = H_(n/k) (x) H_k, so the result is
H_k B x, with k the smallest power of two >= d, repeated n / k times.  It is made once, and Pi picks from it.
"""

from __future__ import annotations

import torch

from guidelib.core.points.part import Exact

RADIX = 16


class Fastfood(Exact):
    """P (size, d) for one tensor of ``size`` entries: nothing is trained, and nothing is saved, since the
    ``generator`` makes it again.

    In 32 bits whatever the type, torch's default one included, so that every model gets the same P.  On the
    meta device without values.
    """

    def __init__(self, size: int, d: int, generator: torch.Generator, device: torch.device):
        super().__init__()
        short = _power_of_two(d)
        n = max(_power_of_two(size), short)
        draw = {"generator": generator, "device": "meta" if device.type == "meta" else "cpu"}
        signs = torch.randint(2, (d,), **draw).float() * 2 - 1
        picks = torch.randperm(n, dtype=torch.int32, **draw)
        picks &= short - 1  # modulo short
        gaussian = torch.randn(n, dtype=torch.float32, **draw)
        gaussian /= (size * gaussian.square().sum()).sqrt()  # S and G in one
        for name, tensor in (("B", signs), ("Pi", picks), ("G", gaussian), ("H", hadamard(RADIX))):
            self.register_buffer(name, tensor.to(device), persistent=False)
        self.size, self.short = size, short

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (d,) -> P x (size,), in the type of x."""
        x = torch.cat((self.B.to(x.dtype) * x, x.new_zeros(self.short - len(x))))
        x = walsh_hadamard(x, self.H).index_select(0, self.Pi)
        return walsh_hadamard(self.G.to(x.dtype) * x, self.H)[: self.size]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def hadamard(n: int) -> torch.Tensor:
    """The Walsh-Hadamard matrix (n, n) in Sylvester's order; n is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32), matrix)
    return matrix


def walsh_hadamard(x: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """H x of x (n,), n a power of two, by products with ``small``, the matrix of a lower order.

    H_n is a Kronecker product of small ones, one for each digit of the index.  A step multiplies along the
    last digit and moves it to the front; when each has been there, they are in order again.
    """
    rest, n = x.numel(), x.numel()
    while rest > 1:
        radix = min(rest, len(small))
        x = small[:radix, :radix].to(x.dtype) @ x.reshape(n // radix, radix).t()
        rest //= radix
    return x.reshape(n)

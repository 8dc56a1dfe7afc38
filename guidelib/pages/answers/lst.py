"""The exercises of notebooks/additive/lst.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="The input of the block is z + mu (s - z). The sigmoid's slope is mu (1 - mu), by alpha / tau.",
    inputs=[(*draw((2, 5, 4), (2, 5, 4), (2, 5, 4)), *rest) for rest in ((0.0, 0.1), (0.2, 0.5))],
    tolerance=1e-4,
)
def gate(G, s, z, alpha, T):
    """The derivative of the loss by alpha, where G is that by the input of the side block."""
    alpha = torch.tensor(alpha, requires_grad=True)
    mu = torch.sigmoid(alpha / T)
    (G * (mu * s + (1 - mu) * z)).sum().backward()
    return alpha.grad


@exercise(
    hint="An inner unit is a row of W1 and a column of W2: add up the sizes of both, then take whole units "
    "from both matrices. The order is that of the backbone, so sort what topk gives.",
    inputs=[(*draw((12, 8), (8, 12)), torch.tensor(kept), n) for kept, n in (([1, 3, 6], 5), ([0, 7], 3))],
)
def prune(W1, W2, stream, n):
    """What structural pruning by size leaves of a feed-forward network, (n, w) and (w, n)."""
    importance = W1.abs().sum(1) + W2.abs().sum(0)
    kept = sorted(sorted(range(len(W1)), key=lambda unit: -importance[unit])[:n])
    return W1[kept][:, stream], W2[stream][:, kept]


@exercise(
    hint="Three rungs a stack, but only the decoder has a cache. For each token a rung keeps a key and a "
    "value, w numbers each, of what has been written and, for the cross-attention, of what was read."
)
def cache():
    """Measured: bytes of the ladder's keys and values in tiny-t5's cache, 40 tokens read and 20 written."""
    model, _ = gl.load_backbone("tiny-t5", task="modern-bible")
    ids = torch.arange(3, 43)[None]

    @torch.no_grad()
    def size():
        found = model(input_ids=ids, decoder_input_ids=ids[:, :20], use_cache=True).past_key_values
        both = found.self_attention_cache, found.cross_attention_cache
        layers = [layer for each in both for layer in each.layers if layer.keys is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    alone = size()
    gl.attach(model, gl.LST(reduction=8))
    return size() - alone

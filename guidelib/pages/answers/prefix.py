"""The exercises of notebooks/additive/prefix.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="The output is (1 - lambda) h + lambda v, and lambda = sigmoid(s - c), where c is not about s.",
    inputs=[(s, *draw((5,), (5, 3), (3,))) for s in (-3.0, 0.0, 2.0)],
    tolerance=1e-5,
)
def slope(s, scores, V, v):
    """The derivative of the output (d,) by s, the score of the one key of the prefix."""
    weights = torch.cat((torch.tensor([s]), scores)).softmax(0)
    output = weights @ torch.cat((v[None], V))
    return weights[0] * (v - output)


@exercise(
    hint="The scores are (T, l + T). Only the part on the right, those of the text, gets the triangle.",
    inputs=[draw((t, 8), (t, 8), (t, 8), (p, 8), (p, 8)) for t, p in ((5, 2), (3, 4), (4, 1))],
    tolerance=1e-5,
)
def causal(q, K, V, P_K, P_V):
    """Attention of a decoder with a prefix, (T, d)."""
    P, T = len(P_K), len(K)
    seen = torch.cat((torch.ones(T, P), torch.ones(T, T).tril()), 1).bool()
    return torch.nn.functional.scaled_dot_product_attention(
        q[None], torch.cat((P_K, K))[None], torch.cat((P_V, V))[None], attn_mask=seen
    )[0]


@exercise(
    hint="What attends keeps its keys and values for the backward pass, for each text of the batch. "
    "The attentions are 6, and each key and each value has 384 numbers."
)
def kept():
    """Measured: by how many bytes what autograd keeps grows from 10 to 30 vectors, on 8 x 32 tokens."""
    return more_saved(gl.PrefixTuning(10), gl.PrefixTuning(30))

"""The exercises of notebooks/selective/fish_mask.ipynb."""

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise
from guidelib.selective.fish_mask import fisher


@exercise(
    hint="Row c of the slope of log p(y) is (1[y = c] - P_c) x. Take the mean of its square over y.",
    inputs=[(draw((6, classes))[0].softmax(1), draw((6, 4))[0]) for classes in (2, 3)],
    tolerance=1e-5,
)
def softmax(P, X):
    """The expected Fisher information (C, d) of the weight of a softmax regression."""
    each = [p[:, None] * (torch.eye(P.shape[1])[c] - P) ** 2 for c, p in enumerate(P.T)]  # (N, C)
    return (sum(each)[:, :, None] * X[:, None] ** 2).mean(0)


@exercise(
    hint="The gradient of one text is a sum over its tokens: of (f, d) products, which is one product of "
    "matrices a text. Square it, and only then take the mean over the texts.",
    inputs=[draw((5, 3, 4), (5, 3, 2)), draw((2, 6, 3), (2, 6, 5))],
    tolerance=1e-5,
)
def layer(A, G):
    """The empirical Fisher information (f, d) of a linear layer's weight, from inputs and gradients."""
    weight = torch.zeros(G.shape[-1], A.shape[-1], requires_grad=True)
    each = [torch.autograd.grad(F.linear(a, weight), weight, g)[0] ** 2 for a, g in zip(A, G, strict=True)]
    return torch.stack(each).mean(0)


@exercise(
    hint="A row of a table has a gradient if it was looked up. How many different tokens are there, the two "
    "special ones included, and how many places?"
)
def tables():
    """Measured: how many entries of the embeddings have Fisher information after one text."""
    model, tokenizer = gl.load_backbone("minilm", task="movie-reviews")
    text = tokenizer("A film is a film is a film.", return_tensors="pt")
    found = [p for name, p in model.named_parameters() if name.endswith("embeddings.weight")]
    example = text | {"labels": torch.tensor([0])}
    return sum(int((each > 0).sum()) for each in fisher(model.eval(), found, [example], True))

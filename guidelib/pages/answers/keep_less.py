"""The exercises of notebooks/foundations/keep_less.ipynb."""

import torch
from transformers import BertConfig, BertModel

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


def _per_layer(m: int, activation: str = "gelu") -> list[int]:
    """Measured: what a second layer of a BERT keeps in full fine-tuning, in tensors of hidden states, as
    autograd would and with keep_less."""
    ids, width = torch.arange(128).reshape(2, 64), 256
    found = []
    for less in (False, True):
        sizes = []
        for layers in (1, 2):
            config = BertConfig(
                vocab_size=200,
                hidden_size=width,
                intermediate_size=m * width,
                num_attention_heads=2,
                num_hidden_layers=layers,
                hidden_act=activation,
            )
            model = BertModel(config)
            gl.attach(model, gl.FullFineTuning())
            sizes.append(gl.costs.saved_bytes(model, {"input_ids": ids}, keep_less=less))
        found.append(round((sizes[1] - sizes[0]) / (ids.numel() * width * 4)))
    return found


@exercise(hint="Two of the terms in 16u grow with m.", inputs=[(1,), (2,), (4,), (8,)])
def layer_units(m):
    """Measured."""
    return _per_layer(m)


@exercise(hint="Who needs ReLU's output? What would a recipe for it start from, and who keeps that?")
def relu():
    """Measured."""
    return _per_layer(4, "relu")


def _norm_cases() -> list[tuple[torch.Tensor, ...]]:
    x, g, gamma, beta = draw((5, 8), (5, 8), (8,), (8,))
    sigma = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = torch.nn.functional.layer_norm(x, (8,), gamma, beta)
    return [(g, y, gamma, beta, sigma), (-3 * g, y, gamma, beta, sigma)]


@exercise(
    hint="First undo the scale and the shift: (y - beta) / gamma is the normalised input. Then the gradient "
    "loses its mean, and its part along the normalised input.",
    inputs=_norm_cases(),
    tolerance=1e-4,
)
def norm_backward(g, y, gamma, beta, sigma):
    """By autograd, through an input that has this output."""
    normed = (y - beta) / gamma
    x = (normed * sigma).requires_grad_()
    again = torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta)
    return torch.autograd.grad(again, x, g)[0]

"""The exercises of notebooks/foundations/memory.ipynb."""

import functools

from transformers import PreTrainedModel

import guidelib as gl
from guidelib.pages.exercises import exercise


def _model() -> PreTrainedModel:
    return gl.load_backbone("minilm", task="movie-reviews")[0]


@functools.cache
def _trained_whole() -> PreTrainedModel:
    model = _model()
    gl.attach(model, gl.FullFineTuning())
    return model


def _kept(model: PreTrainedModel, rows: int, length: int) -> int:
    return gl.costs.saved_bytes(model, gl.token_batch(model, rows, length))


@exercise(hint="A trained bias keeps nothing of its own. What does the gradient pass through on its way?")
def biases():
    """Measured on 8 x 32 tokens, in tensors of the hidden states' size per layer."""
    model = _model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or "classifier" in name)
    size = 4 * 8 * 32 * model.config.hidden_size
    return round(_kept(model, 8, 32) / (size * model.config.num_hidden_layers))


@exercise(
    hint="Five more tensors of the hidden states' size in each layer, no paths, one more LayerNorm below.",
    inputs=[(8, 32), (4, 48), (3, 10)],
)
def full_step(B, T):
    """Measured."""
    return _kept(_trained_whole(), B, T)


@exercise(
    hint="The inputs of L / s groups stay all the time. What comes back is one group, whole.",
    inputs=[(64, s, c) for s in (1, 2, 4, 8) for c in (11, 16)] + [(12, 3, 16)],
)
def peak(L, s, c):
    groups, group = L / s, s * c
    return groups + group


@exercise(
    hint="Where does the derivative of the peak with respect to s vanish?",
    inputs=[(64, 16), (64, 11), (32, 22.8)],
)
def best(L, c):
    return L**0.5 / c**0.5


@exercise(
    hint="In u, the weights are h T / d in each layer. What goes is the output, the softmax's number, and "
    "in the first layer q."
)
def eager():
    """Measured: the first length at which eager attention keeps more."""
    model = _model()
    gl.attach(model, gl.LoRA(r=8))

    def more(length: int) -> bool:
        found = []
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            found.append(_kept(model, 2, length))
        return found[0] > found[1]

    low, high = 1, 256  # it keeps less at the first and more at the second
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if more(middle) else (middle, high)
    return high

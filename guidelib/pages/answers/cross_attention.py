"""The exercises of notebooks/selective/cross_attention.ipynb."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="h is a times m W_v^T. Which product has the shape of W_v and holds all three?",
    inputs=[draw((5, 7), (7, 4), (5, 3)), draw((2, 6), (6, 3), (2, 8))],
    tolerance=1e-5,
)
def gradient_of_values(a, m, g):
    """Of W_v (n, d), from the attention weights (T, S), the encoder's states (S, d) and that of h (T, n)."""
    W = torch.zeros(g.shape[1], m.shape[1], requires_grad=True)
    return torch.autograd.grad(a @ (m @ W.T), W, g)[0]


def _written() -> tuple[T5ForConditionalGeneration, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A T5 without an encoder's pass, states of two texts, the second shorter, their mask, and labels."""
    size = dict(d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=1, vocab_size=20, dropout_rate=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return model, *draw((2, 4, 8)), mask, torch.tensor([[3, 4, 5], [6, 7, 1]])


@exercise(
    hint="A model of transformers takes encoder_outputs, a tuple that begins with the states. It still wants "
    "to know where the padding is.",
    inputs=[_written()],
    tolerance=1e-5,
)
def loss_of(model, states, mask, labels):
    """The loss of an encoder-decoder from what its encoder gave."""
    short = [(states[i : i + 1, : int(n)], labels[i : i + 1]) for i, n in enumerate(mask.sum(1))]
    losses = [model(encoder_outputs=(own,), labels=target).loss for own, target in short]
    return sum(losses) / len(losses)


@exercise(
    hint="The state itself is saved once for all keys and values. Each of the four blocks saves a key and a "
    "value. Texts 8, but of the position biases there is one table."
)
def a_token():
    """Predicted, as measured: by how many bytes the activations grow with the source."""
    cross, sizes = gl.CrossAttentionTuning(), dict(task="modern-bible", batch=8, target_length=32)
    few, more = (gl.predict("tiny-t5", cross, length=n, **sizes).saved_bytes for n in (40, 41))
    return more - few

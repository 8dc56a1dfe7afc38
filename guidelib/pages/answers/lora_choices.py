"""The exercises of notebooks/reparametrization/lora_choices.ipynb."""

import torch
from transformers import BertConfig, BertModel

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(
    hint="Square them before you add them up.",
    inputs=[
        (torch.tensor([3.0, 2.0, 1.0, 1.0]), 0.5),
        (torch.tensor([3.0, 2.0, 1.0, 1.0]), 0.8),
        (torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.7),
        (torch.arange(384.0, 0, -1), 0.9),
    ],
)
def rank_for(values, wanted):
    held, squares = 0.0, [float(value) ** 2 for value in values]
    for k, square in enumerate(squares, 1):
        held += square
        if held >= wanted * sum(squares):
            return k
    return len(squares)


@exercise(
    hint="After every step, B has to be what it was, divided by c. How much smaller are its steps then, and "
    "which share of B is taken off?",
    inputs=[(2.0,), (3.0,), (0.5,)],
)
def trade(c):
    """The page trains with both and compares."""
    rate = 1 / c
    return [rate, 1 / rate]  # rate times decay stays


@exercise(
    hint="q and v share one input, and a number takes 4 bytes.",
    inputs=[(2, 64, 3, 10), (4, 64, 3, 10), (2, 32, 4, 16)],
)
def saved(L, d, B, T):
    """Measured."""
    sizes = {"hidden_size": d, "intermediate_size": 4 * d, "num_attention_heads": 2, "num_hidden_layers": L}
    model, found = BertModel(BertConfig(**sizes, vocab_size=99)), []
    for freeze in (False, True):
        peft = gl.attach(model, gl.LoRA(r=4, freeze_A=freeze))
        found.append(gl.costs.saved_bytes(model, {"input_ids": torch.arange(B * T).reshape(B, T) % 99}))
        peft.detach()
    return found[0] - found[1]

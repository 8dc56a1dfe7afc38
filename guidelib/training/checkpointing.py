"""Activation checkpointing, which transformers before 5.23 calls gradient checkpointing."""

from transformers import PreTrainedModel


def checkpointing(model: PreTrainedModel, on: bool = True) -> None:
    """Let the backward pass compute a block's activations again instead of keeping them, or no longer.

    As transformers does it, in any of its versions.  It acts in training mode.  Raises ValueError if the
    model cannot.
    """
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{word}_checkpointing_{'enable' if on else 'disable'}")()

"""The costs of a method on any model, from its configuration alone."""

from __future__ import annotations

import inspect

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig, PreTrainedModel

from guidelib.core.anatomy import Anatomy
from guidelib.core.attaching import attach
from guidelib.core.method import Method, expect, is_whole
from guidelib.costs.measure import Costs, measure
from guidelib.costs.shapes import on_shapes
from guidelib.costs.step import Batch
from guidelib.materials.backbones import blank_backbone
from guidelib.materials.configs import load_config
from guidelib.materials.tasks import Task
from guidelib.training.checkpointing import checkpointing as switch_on_checkpointing


@unset_fake_temporarily()
def predict(
    model: str | PreTrainedConfig | PreTrainedModel,
    method: Method,
    *,
    batch: int = 8,
    length: int = 64,
    target_length: int | None = None,
    padded: bool = False,
    task: Task | str | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    keep_less: bool = False,
    dropout: bool = False,
) -> Costs:
    """What ``measure`` gives for ``method`` on a model, without the model's weights.

    model: a short name or hub id as `load_backbone` takes it, of which only the configuration is read; a
    transformers configuration; or a model, on torch's meta device or anywhere, which is not touched: a bare
    backbone, a language model or a classifier of texts (others: `measure` with a batch of yours).  From a
    name or a configuration it is the model that `load_backbone` makes for ``task``.  Without one an encoder
    classifies into as many labels as its configuration says, the others model language.

    batch x length tokens; an encoder-decoder's targets have ``target_length``, by default ``length``.
    padded: whether there is padding in the batch.  If not, there is a mask of ones, as a tokenizer gives it,
    and transformers drops it for the attention, whose kernel then keeps less.

    task, dtype (by default 32 bits): for a name or a configuration; a model has its own.  checkpointing: with
    gradient checkpointing, as transformers switches it on.  keep_less, dropout: as for `measure`.

    Raises as `load_backbone` and `attach` do, and ValueError for an impossible size, or more tokens than a
    learned table of positions has.
    """
    for name, value in (("batch", batch), ("length", length), ("target_length", target_length)):
        whole = is_whole(value) or (value is None and name == "target_length")
        expect(whole, name, value, "a whole number of at least 1")
    model = _blank(model, task, dtype)
    expect_room(model, length, target_length or length)
    attach(model, method)
    if checkpointing:
        switch_on_checkpointing(model)
    inputs = _batch(model, batch, length, target_length or length, padded)
    return measure(model, inputs, dropout=dropout, keep_less=keep_less)


def expect_room(model: PreTrainedModel, length: int, target_length: int) -> None:
    """Raise ValueError if a stack has a table of fewer positions than it is to read."""
    for name, body in Anatomy(model).bodies().items():
        targets = name == "decoder" and model.config.is_encoder_decoder
        argument, tokens = ("target_length", target_length) if targets else ("length", length)
        expect(tokens <= body.room, argument, tokens, f"at most {body.room}, the positions of the {name}")


def _blank(
    model: str | PreTrainedConfig | PreTrainedModel, task: Task | str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        for name, value in (("task", task), ("dtype", dtype)):
            expect(value is None, name, value, "None for a model, which has its own")
        return on_shapes(model)
    config = load_config(model) if isinstance(model, str) else model
    right = isinstance(config, PreTrainedConfig)
    expect(right, "model", config, "a backbone's name, a transformers configuration or a model")
    with torch.device("meta"):
        return blank_backbone(config, task, dtype=dtype or torch.float32)


def _batch(model: PreTrainedModel, rows: int, length: int, target_length: int, padded: bool) -> Batch:
    def ones(*shape: int) -> torch.Tensor:
        device = "cpu" if model.device.type == "meta" else model.device
        return torch.ones(*shape, dtype=torch.long, device=device)

    ids, mask = ones(rows, length), ones(rows, length)
    if padded:
        mask[-1, -1] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    labelled = "labels" in inspect.signature(model.forward).parameters  # or it is a bare backbone
    words = model.get_output_embeddings() is not None
    if model.config.is_encoder_decoder:
        fits = words or not labelled
        accepted = "an encoder-decoder that writes or is bare; `measure` takes a batch of yours"
        expect(fits, "model", type(model).__name__, accepted)
        return inputs | {"labels" if labelled else "decoder_input_ids": ones(rows, target_length)}
    if not labelled:
        return inputs
    return inputs | {"labels": ones(rows, length) if words else ones(rows)}

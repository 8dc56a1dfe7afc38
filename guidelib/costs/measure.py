"""What a method costs: the memory of a training step by purpose, operations, and the size of the file.

All figures are deterministic, and what depends on a step is predicted as well, on shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED
from guidelib.core.attaching import Attachment, Count
from guidelib.core.method import expect
from guidelib.core.values import has_values
from guidelib.costs.plan import MemoryPlan
from guidelib.costs.shapes import file_size
from guidelib.costs.step import Batch, Step, count_step


@dataclass(frozen=True)
class Costs:
    """Costs of one training step on one batch, and of the stored file.

    memory: its four terms in bytes, and their ``total``.  Weights are all parameters and buffers that are
    there, each storage once; gradients and Adam's two moments are those of the trainable parameters;
    activations are ``saved_bytes``.  Not among them are the copy of the base that an attachment keeps for
    ``detach``, and the one in 32 bits by which `fit` trains what has 16 ("mixed" in `memory_plan`).
    forward_flops, backward_flops, operations: see `Step`.  file_bytes: the safetensors file that
    ``save`` writes (the whole model where nothing is attached).  predicted: the step, run on shapes alone.
    """

    count: Count | None
    memory: MemoryPlan
    forward_flops: int
    backward_flops: int
    operations: int
    file_bytes: int
    predicted: Step

    @property
    def gradient_bytes(self) -> int:
        return self.memory.gradients

    @property
    def optimizer_bytes(self) -> int:
        return self.memory.optimizer

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps from forward to backward, without parameters, buffers and inputs."""
        return self.memory.activations


@unset_fake_temporarily()
def measure(model: PreTrainedModel, batch: Batch, *, dropout: bool = False, keep_less: bool = False) -> Costs:
    """Measure one step of ``model`` as it stands on ``batch`` (the tensors among its forward's keyword
    arguments, labels included), and predict it.

    With labels the loss is the one that ``fit`` trains: with a method's regulariser and its further passes.
    Without, the sum of the first output stands in for it.  ``dropout`` leaves the model's dropout on;
    ``keep_less`` recomputes what is cheap (see ``guidelib.training.recompute``).

    A model without values, on the meta device or of torch's FakeTensorMode, has the costs of a real one.  Of
    a batch that has values a mask without padding is dropped at the backbone, as transformers does; a mask
    without values counts as one with padding.

    The model, its gradients and the random state are left as they were.  Raises ValueError if nothing that is
    trainable acts.
    """
    expect(isinstance(model, PreTrainedModel), "model", model, "a transformers model")
    right = isinstance(batch, Mapping) and all(isinstance(t, torch.Tensor) for t in batch.values())
    expect(right, "batch", batch, "a mapping of names to tensors")
    trainable = [p for p in model.parameters() if p.requires_grad]
    added = getattr(model, ADDED, None)
    at_rest = {*added.parameters()} if added is not None and added.attachment.merged else set()
    expect(bool(trainable), "model", type(model).__name__, "a model with trainable parameters")
    expect(bool({*trainable} - at_rest), "model", "a merged one", "unmerged; call unmerge() first")
    options = {"dropout": dropout, "keep_less": keep_less}
    predicted = count_step(model, batch, **options, values=False)
    there = all(map(has_values, trainable))
    step = count_step(model, batch, **options) if there else predicted
    gradients = sum(p.nbytes for p in trainable)
    attachment: Attachment | None = getattr(getattr(model, ADDED, None), "attachment", None)
    state = attachment.state() if attachment else dict(model.named_parameters())
    return Costs(
        count=attachment.count() if attachment else None,
        memory=MemoryPlan(
            weights=_weight_bytes(model),
            gradients=gradients,
            master=0,
            optimizer=2 * gradients,
            activations=step.saved_bytes,
        ),
        forward_flops=step.forward_flops,
        backward_flops=step.backward_flops,
        operations=step.operations,
        file_bytes=file_size(state, attachment.metadata() if attachment else None),
        predicted=predicted,
    )


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the distinct storages of parameters and buffers."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

"""Run what lies below everything that is trained once per batch, and take its states from memory after that.

The blocks below the lowest one in which something is trained give the same states for a batch in each epoch,
if no dropout acts there and the batch is made of the same texts.  So the first epoch keeps what those above
read of it: for a late LoRA the states that enter its lowest block, for a side network those of all blocks
beside which it stands.  Later epochs skip the blocks.  Nothing else changes, so the same operations on the
same numbers give the same result to the bit.

Batches are composed once.  A text's states are not the same to the last bit beside other texts: where the
padding is another, sums are rounded differently.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from guidelib.core.anatomy import Anatomy
from guidelib.core.attaching import Attachment
from guidelib.core.method import expect
from guidelib.core.modes import modes_kept
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call

Batch = Mapping[str, torch.Tensor]
WAYS = ("still", "memory")


@dataclass
class _Given:
    """What one batch's pass has left: of each block that is read what it gave, of the modules within it what
    they were given.  done: whether the pass has ended."""

    outputs: dict[int, Any] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    done: bool = False


class States(Part):
    """The frozen blocks of one model, and what they gave for each batch.

    blocks: those that are not run again, none of them without ``keep``.  folder: where what they gave lies,
    in files that are mapped into memory; None for memory itself.
    Raises ValueError if no block is frozen.
    """

    def __init__(self, attachment: Attachment, batch: Batch, *, keep: bool, folder: Path | None = None):
        super().__init__()
        self.folder = folder
        self._kept: dict[bytes, _Given | Path] = {}
        bodies = Anatomy(attachment.model).bodies().values()
        candidates = [_bottom(attachment.parts, body.blocks) for body in bodies]
        moved = _moved(attachment.model, batch, [block for blocks in candidates for block in blocks])
        frozen, still = [], set()
        for body, blocks in zip(bodies, candidates, strict=True):
            n = next((i for i, block in enumerate(blocks) if block in moved), len(blocks))
            if n:
                above = {module for block in body.blocks[n:] for module in block.modules()}
                still |= {*body.module.modules()} - above
                frozen.append(blocks[:n])
        if not frozen:
            raise ValueError(
                f"frozen must be None for {type(attachment.method).__name__} here: it trains from the first "
                "block on, so no block below could be run once"
            )
        self._still, self._numbers = tuple(still), {}  # of what it is put around, in the order of `plug`
        self._read = {blocks[-1] for blocks in frozen}
        looking = [module for part in attachment.parts if part.closed for module in part.plugged]
        self._read |= {module for blocks in frozen for block in blocks for module in block.modules()} & {
            *looking
        }
        self.blocks = tuple(block for blocks in frozen for block in blocks) if keep else ()

    def plug(self) -> None:
        for block in self.blocks:
            for module in block.modules():
                if module is block or module in self._read:
                    self._numbers[module] = len(self._numbers)
                    self.around(module, self._block if module is block else self._inner)

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Around a training pass with ``batch``: no dropout below, and what is known is not run again."""
        for module in self._still:
            module.training = False
        if not self.blocks:
            yield
            return
        key = _key(batch)
        given = self._kept.get(key, _Given())
        if isinstance(given, Path):
            given = _Given(*torch.load(given, mmap=True, weights_only=True), done=True)
        with passes.noted({self: given}):
            yield
        if not given.done:
            given.done = True
            self._kept[key] = given if self.folder is None else self._file(given)

    def _file(self, given: _Given) -> Path:
        path = self.folder / f"{len(self._kept)}.pt"
        torch.save((given.outputs, given.inputs), path)
        return path

    def _block(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around a frozen block."""
        given, number = passes.notes().get(self), self._numbers[call.module]
        if given is None:
            return call(*args, **kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        if not given.done:
            output = call(*args, **kwargs)
            # where nobody reads it, its form is enough: the next block that is run reads another's
            full = call.module in self._read
            given.outputs[number] = output if full else _form(output)
            return output
        for module in call.module.modules():
            if self._numbers.get(module) in given.inputs:
                module(given.inputs[self._numbers[module]])  # those that look at it are called again
        output = given.outputs[number]
        return output if call.module in self._read else _filled(output, states)

    def _inner(self, call: Call, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around a module within a frozen block, innermost: what else is around it looks at its input."""
        given = passes.notes().get(self)
        if given is None or not given.done:
            if given is not None:
                given.inputs[self._numbers[call.module]] = x
            return call(x, *args, **kwargs)
        return x


@contextmanager
def frozen_states(attachment: Attachment, frozen: str | Path | None, batch: Batch) -> Iterator[States | None]:
    """What `fit` is to do with the frozen blocks by its argument ``frozen``; nothing of it stays behind.

    ``batch`` shows which they are.  Raises ValueError for another argument, or if there are none.
    """
    if frozen is None:
        yield None
        return
    there = frozen in WAYS or (isinstance(frozen, str | Path) and Path(frozen).is_dir())
    expect(there, "frozen", frozen, f"one of {', '.join(WAYS)}, a folder that is there, or None")
    with nullcontext() if frozen in WAYS else tempfile.TemporaryDirectory(dir=frozen) as folder:
        states = States(attachment, batch, keep=frozen != "still", folder=folder and Path(folder))
        try:
            states.plug()
            yield states
        finally:
            states.unplug()


class SameBatches(Sampler):
    """Batches of texts of similar length, composed once; each epoch draws their order."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        order = get_length_grouped_indices(lengths, batch_size, generator=self.generator)
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[int]:
        whole = [batch for batch in self.batches if len(batch) == len(self.batches[0])]
        for i in torch.randperm(len(whole), generator=self.generator).tolist():
            yield from whole[i]
        for batch in self.batches[len(whole) :]:  # one that is shorter can only be the last
            yield from batch


def _bottom(parts: list[Part], blocks: tuple[nn.Module, ...]) -> list[nn.Module]:
    """The blocks before the first one in which something is trained."""
    bottom = []
    for block in blocks:
        within = {*block.modules()}
        acting = [part for part in parts if block not in part.closed and part.acts_in(within)]
        if any(p.requires_grad for module in (block, *acting) for p in module.parameters()):
            break
        bottom.append(block)
    return bottom


def _moved(model: nn.Module, batch: Batch, blocks: list[nn.Module]) -> set[nn.Module]:
    """Those of ``blocks`` whose states depend on something that is trained, before or beside them."""
    moved: set[nn.Module] = set()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if (output[0] if isinstance(output, tuple) else output).requires_grad:
            moved.add(module)

    hooks = [block.register_forward_hook(look) for block in blocks]
    try:
        with modes_kept(model), torch.enable_grad():
            model.eval()(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return moved


def _key(batch: Batch) -> bytes:
    found = hashlib.blake2b()
    for name, tensor in sorted(batch.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()


def _form(output: Any) -> int | None:
    """How many values a block gives; None if it is one tensor and no tuple."""
    return len(output) if isinstance(output, tuple) else None


def _filled(form: int | None, states: torch.Tensor) -> Any:
    """A block's output of that form, with states that nobody reads."""
    return states if form is None else (states, *[None] * (form - 1))

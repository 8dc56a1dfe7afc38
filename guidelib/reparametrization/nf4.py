"""NF4 - frozen weights in four bits.  Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3.

    W ~ W_deq = s * level[code]     code: 4 bits per entry,  s: one scale per block of 64 entries
    level: 16 quantiles of N(0, 1), scaled to [-1, 1], with an exact 0;  s: the block's largest magnitude

Double quantisation stores the scales in 8 bits: less their mean, in blocks of 256, each with its own 32-bit
step.  That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits per parameter instead of 4 + 32/64 = 4.5.

While it acts, a layer computes y = W_deq x + b, and W_deq again for the gradient of x: between the two
passes only the codes are there.  Nothing of it is trained or stored in a file.  Not the identity at the
start, but near it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from guidelib.core.anatomy import Site, Targets
from guidelib.core.attaching import attached
from guidelib.core.method import Method, expect, is_whole
from guidelib.core.points.part import Exact, Place, hollow, where
from guidelib.core.points.passes import Call
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.core.values import beside, has_values

SCALES = 256  # scales that share one step in double quantisation


def levels() -> torch.Tensor:
    """The 16 values of NF4 in 64 bits, rising from -1 to 1.

    Seven negative and eight positive ones with equal steps of probability, and 0.  The outermost probability
    is half-way between 1/32 and 1/30, those of 16 and of 15 equal bins, away from certainty.
    """
    tail = (1 / 32 + 1 / 30) / 2

    def quantiles(n: int) -> list[float]:  # n of them, from the tail to just before the middle
        return [NormalDist().inv_cdf(tail + i * (0.5 - tail) / n) for i in range(n)]

    values = [*quantiles(7), 0.0, *(-q for q in reversed(quantiles(8)))]
    return torch.tensor(values, dtype=torch.float64, device="cpu") / values[-1]


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two levels that each byte stands for, (256, 2)."""
    with _disable_current_modes():  # kept for everybody, so nobody's shapes and in nobody's count
        byte = torch.arange(256, device="cpu")
        return levels()[torch.stack((byte >> 4, byte & 15), dim=1)].to(device)


class Quantized(Exact):
    """A weight of any shape in NF4.  Its buffers are all that there is of it.

    codes: two entries per byte.  scales: one per block, 32-bit, or 8-bit whole numbers with ``double``; then
    also steps, one per 256 scales, and mean.  The paper's 8-bit scales are floats; evenly spaced ones have
    the smaller error here, since the mean is subtracted (our choice).

    Raises ValueError for a block size that is not even and positive, a weight that is not a float, or not
    finite.
    """

    def __init__(self, weight: torch.Tensor, block: int = 64, double: bool = True):
        super().__init__()
        _expect_block(block)
        expect(weight.is_floating_point(), "weight", weight.dtype, "of a floating-point type")
        self.shape, self.dtype, self.block = weight.shape, weight.dtype, block
        self.pairs = _pairs(weight.device)  # no buffer, since all layers share it
        blocks = _blocks(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), block)
        scales = blocks.abs().amax(1)
        finite = not has_values(weight) or bool(scales.isfinite().all())
        expect(finite, "weight", "NaN or infinity", "finite")
        edges = (levels()[1:] + levels()[:-1]) / 2  # an entry goes to the nearest level
        # a block of zeros has no scale, and any will do
        relative = blocks / torch.where(scales == 0, 1, scales).unsqueeze(1)
        codes = torch.bucketize(relative, edges.to(blocks.device, blocks.dtype), out_int32=True)
        codes = codes.to(torch.uint8).flatten()
        self._keep("codes", codes[::2] << 4 | codes[1::2])
        scales, self.double = scales.float(), double
        if double:
            mean = scales.mean()
            groups = _blocks(scales - mean, SCALES)
            steps = groups.abs().amax(1) / 127
            step = torch.where(steps == 0, 1, steps).unsqueeze(1)
            # no scale is below zero: beside a scale that is far larger it would be rounded to there
            whole = torch.maximum((groups / step).round(), (-mean / step).ceil())
            self._keep("steps", steps)
            self._keep("mean", mean)
            scales = whole.to(torch.int8).flatten()[: len(scales)].clone()
        self._keep("scales", scales)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)  # made again from the base, never in a file

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.pairs = _pairs(self.codes.device)
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W_deq, of the weight's shape and, unless ``dtype`` is given, its type."""
        dtype, scales = dtype or self.dtype, self.scales
        if self.double:
            scales = _blocks(scales, SCALES) * self.steps.unsqueeze(1) + self.mean
            scales = scales.flatten()[: len(self.scales)]
        pairs = beside(self.codes, self.pairs).to(dtype)
        values = pairs.index_select(0, self.codes.int()).view(-1, self.block)
        values = values.mul_(scales.to(dtype).unsqueeze(1)).flatten()
        return values[: self.shape.numel()].view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.nbytes / self.shape.numel()


def _blocks(flat: torch.Tensor, size: int) -> torch.Tensor:
    """All entries in rows of ``size``, the last one filled up with zeros."""
    flat = flat.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _expect_block(block: object) -> None:
    right = is_whole(block) and block <= 2**20 and block % 2 == 0
    expect(right, "block", block, "an even whole number from 2 to 1,048,576")


class _Linear(torch.autograd.Function):
    """y = W_deq x + b.  Autograd keeps neither W_deq nor x: W_deq is made again for the gradient of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, bias: torch.Tensor | None, quantized: Quantized, turned: bool, dtype=None):
        weight = quantized.dequantize(dtype)
        return F.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype, ctx.shape, ctx.quantized, ctx.turned, ctx.held = inputs[0].dtype, output.shape, *inputs[2:]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            # autocast may have changed the type
            weight = ctx.quantized.dequantize(ctx.held).to(gradient.dtype)
            of_x = F.linear(gradient, weight if ctx.turned else weight.t()).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_x, of_bias, None, None, None

    @staticmethod
    def jvp(ctx, along_x: torch.Tensor | None, along_bias: torch.Tensor | None, *others: None):
        if along_x is None:
            return along_bias.expand(ctx.shape)
        return _Linear.forward(along_x, along_bias, ctx.quantized, ctx.turned, ctx.held)


class _Compiled(_Linear):
    """The same for torch.compile, which takes no function with a ``jvp``."""

    jvp = torch.autograd.Function.jvp


@dataclass(frozen=True)
class NF4(Method):
    """Compute with the targets' weights in NF4.  Embeddings, norms, biases and the head stay as they are.

    targets: roles (see anatomy.py); of GPT-2's fused layer all three maps or none.  block: entries per scale.
    double: whether the scales are quantised too.  The base's own weights stay beside the codes, so that
    ``detach`` gives them back; ``release`` lets them go.
    """

    targets: Targets = "all"
    block: int = 64
    double: bool = True

    def __post_init__(self):
        self.several("targets")
        _expect_block(self.block)
        expect(isinstance(self.double, bool), "double", self.double, "True or False")

    def parts(self, anatomy, saved):
        layers: dict[nn.Module, list[Site]] = {}
        for site in anatomy.linears(self.targets):
            layers.setdefault(site.module, []).append(site)
        for layer, sites in layers.items():
            whole = sum(site.weight.numel() for site in sites) == layer.weight.numel()
            expect(whole, "targets", self.targets, f"all maps of the layer that holds {sites[0].name}")
        names = {id(parameter): name for name, parameter in anatomy.base_parameters().items()}
        parts = []
        for layer, sites in layers.items():
            try:
                quantized = Quantized(layer.weight, self.block, self.double)
            except ValueError as error:
                raise ValueError(f"model: {sites[0].name}: {error}") from None
            for site in sites:  # a fused layer is quantised once, by the part of its first map
                owned = {names[id(layer.weight)]: layer.weight} if site is sites[0] else {}
                parts.append(NF4Part(self, anatomy.model, site, quantized, owned))
        return parts


class NF4Part(WeightSpacePart):
    """One linear map in NF4.  The maps of a fused layer share its codes; the first one's part does the
    work."""

    first = True  # or merging would write W_deq over what came before

    def __init__(
        self,
        method: NF4,
        model: PreTrainedModel,
        site: Site,
        quantized: Quantized,
        owned: dict[str, nn.Parameter],
    ):
        super().__init__(method, model, owned)
        self.name = f"NF4_{site.name.replace('.', '_')}"
        self.quantized, self.released = quantized, False
        self._site = (site,)  # in a tuple, so that the layer is not registered as a child

    @property
    def site(self) -> Site:
        return self._site[0]

    @property
    def place(self) -> str:
        return self.site.name

    @property
    def places(self) -> dict[Place, int]:
        return {where(self.site.module.weight, self.site.rows): self.site.weight.numel()}

    def effective(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self.quantized.dequantize(weight.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        weight = self.site.module.weight
        if self.released and bool(weight.flatten()[0].isnan()):  # a cast has given the stand-in memory
            self.release()
        return self

    def plug(self) -> None:
        layer = self.site.module
        expect(
            not layer.weight.requires_grad,
            "method",
            f"one that trains the weight of {self.site.name} in place",
            "one that leaves the weights which NF4 quantises frozen",
        )
        if self.replaced:
            self.around(layer, self._forward)

    def _forward(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        if call.behind:  # which wants a weight
            return super()._forward(call, x)
        layer = call.layer
        linear = _Compiled if torch.compiler.is_compiling() else _Linear
        return linear.apply(x, layer.bias, self.quantized, isinstance(layer, Conv1D), layer.weight.dtype)

    def restore(self) -> None:
        weight = self.site.module.weight
        if self.replaced and (self.released or hollow(weight)):
            weight.data = self.quantized.dequantize(weight.dtype)

    def release(self) -> None:
        weight = self.site.module.weight
        if self.replaced:
            # one number, seen everywhere
            weight.data = weight.new_full((), float("nan")).expand(weight.shape)
        self.released = True


def release(model: PreTrainedModel) -> int:
    """Let go of the base weights that NF4 has quantised; returns the bytes that were freed.

    The method goes on as before.  A layer's ``weight`` is then a stand-in without memory, NaN all over, and
    so it is in ``state_dict``; ``merge`` and ``detach`` fill in W_deq, since the original is gone.  Call it
    last, when the model is on its device: a copy of the stand-ins has memory again.

    Raises ValueError if nothing in NF4 is attached, or the method is merged.
    """
    attachment = attached(model)
    parts = [part for part in attachment.parts if isinstance(part, NF4Part)]
    expect(bool(parts), "model", f"one that carries {attachment.method!r}", "one with NF4 or QLoRA attached")
    expect(not attachment.merged, "model", "a merged one", "unmerged; call unmerge() first")
    freed = 0
    attachment.keep_fingerprint()
    for part in parts:
        if part.replaced and not part.released:
            freed += part.site.module.weight.nbytes
        part.release()
    return freed

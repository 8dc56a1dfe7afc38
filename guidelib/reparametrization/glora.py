"""GLoRA - generalised LoRA: five supports for one weight and its bias.  Chavan et al. 2023,
arXiv:2306.07967, section 3.2.

    W' = W + W * A + B              A, B: (d_out, d_in), as "lora", "vector", "scalar" or "none"
    b' = b + b * D + E + W C        C: (d_in,), "lora", "vector" or "none";  D, E: (d_out,), "vector" ...

The paper writes W A; the authors' code multiplies entry by entry, and so does this file.  "lora" is a product
of two factors, "vector" one number per row, "scalar" one number.  Everything starts so that W' = W, b' = b.
Merges exactly where the layer has a bias, or C and E are "none".  count per target = the sum of
r (d_out + d_in), d_out, 1 or 0 for A and B;  r (d_in + 1), d_in or 0 for C;  d_out, 1 or 0 for D and E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Site, Targets
from guidelib.core.method import expect, is_whole
from guidelib.core.points.weight_delta import BranchCost, Delta, WeightDelta, added_dtype

FORMS = {
    **dict.fromkeys("AB", ("lora", "vector", "scalar", "none")),
    "C": ("lora", "vector", "none"),
    **dict.fromkeys("DE", ("vector", "scalar", "none")),
}


@dataclass(frozen=True)
class GLoRA(WeightDelta):
    """Supports A to E of every target, each in one of its forms.

    r: rank of those that are "lora", at least 1 and at most the smaller side of the weight.  targets: roles
    (see anatomy.py).  On a layer without a bias D has nothing to scale and is left out; C and E make a bias
    there, which cannot be merged.
    """

    r: int = 4
    A: str = "lora"
    B: str = "lora"
    C: str = "lora"
    D: str = "scalar"
    E: str = "scalar"
    targets: Targets = ("q", "v")

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.r), "r", self.r, "a whole number of at least 1")
        for name, forms in FORMS.items():
            form = getattr(self, name)
            expect(form in forms, name, form, f"one of {', '.join(forms)}")
        used = any(getattr(self, name) != "none" for name in FORMS)
        expect(used, "A", self.A, "something else than none, or B, C, D or E")

    def build(self, site: Site) -> Supports:
        forms = {name: getattr(self, name) for name in FORMS}
        if "lora" in forms.values():
            smaller = min(site.shape)
            expect(self.r <= smaller, "r", self.r, f"at most {smaller}, the smaller side of {site.name}")
        if site.bias is None:
            forms["D"] = "none"
            alone = all(form == "none" for form in forms.values())
            expect(not alone, "D", self.D, f"beside another support, since {site.name} has no bias to scale")
        return Supports(site.weight, self.r, forms)


class Supports(Delta):
    """A to E for one weight (d_out, d_in), on its device and in its type (32 bits at least).

    A support is a parameter of its name; as "lora" it is two, and up starts at zero: A_up (d_out, r),
    A_down (r, d_in); C_up (d_in, r), C_down (r, 1).
    """

    additive = False

    def __init__(self, weight: torch.Tensor, r: int, forms: dict[str, str]):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.shape, self.r, self.forms = (d_out, d_in), r, forms
        self.moves_bias = any(forms[name] != "none" for name in "CDE")
        columns = {"A": (d_out, d_in), "B": (d_out, d_in), "C": (d_in, 1), "D": (d_out,), "E": (d_out,)}
        for name, (rows, *width) in columns.items():
            ones = [1] * len(width)
            match forms[name]:
                case "lora":
                    self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(rows, r, **like)))
                    down = nn.init.xavier_uniform_(torch.empty(r, *width, **like))
                    self.register_parameter(f"{name}_down", nn.Parameter(down))
                case "vector":
                    self.register_parameter(name, nn.Parameter(torch.zeros(rows, *ones, **like)))
                case "scalar":
                    self.register_parameter(name, nn.Parameter(torch.zeros(1, *ones, **like)))

    def support(self, name: str) -> torch.Tensor | float:
        """A and B (d_out, d_in), (d_out, 1) or (1, 1); C (d_in, 1); D and E (d_out,) or (1,); "none" is 0."""
        if self.forms[name] == "lora":
            return getattr(self, f"{name}_up") @ getattr(self, f"{name}_down")
        return 0.0 if self.forms[name] == "none" else getattr(self, name)

    def shift(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | float:
        """b' - b = b * D + E + W C, where the layer's missing b is zero."""
        shift = self.support("E")
        if self.forms["D"] != "none":
            shift = bias * self.D + shift
        if self.forms["C"] != "none":
            c = self.support("C")
            shift = (weight.to(c.dtype) @ c).squeeze(1) + shift
        return shift

    def effective(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.moves_bias:
            bias = (weight.new_zeros(len(weight)) if bias is None else bias) + self.shift(weight, bias)
        return weight + weight * self.support("A") + self.support("B"), bias

    def adjust(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y' = y + (W * A + B) x + (b' - b).

        Only a low-rank A needs the weight-sized W * A; a vector or a scalar scales W x, which is at hand.
        """
        change = self.shift(weight, bias)
        if self.forms["A"] == "lora":
            both = weight * self.support("A") + self.support("B")
            change = F.linear(x, both.to(x.dtype)) + change
            return y + change.to(y.dtype)
        if self.forms["A"] != "none":
            change = (y if bias is None else y - bias) * self.A.squeeze(1) + change
        if self.forms["B"] == "lora":
            z = F.linear(x, self.B_down.to(x.dtype))  # (..., r)
            change = F.linear(z.to(self.B_up.dtype), self.B_up) + change
        elif self.forms["B"] != "none":  # the same number all along a row
            change = x.sum(-1, keepdim=True) * self.B.squeeze(1) + change
        return y + change.to(y.dtype)

    def cost(self) -> BranchCost:
        (d_out, d_in), r, forms = self.shape, self.r, self.forms
        low = [name for name in "AB" if forms[name] == "lora"]
        once, once_back = 0, 0
        if forms["C"] != "none":  # W C, and the gradient of C
            once, once_back = 2 * d_out * d_in, 2 * d_out * d_in
        if forms["C"] == "lora":  # the product of its factors, and the gradient of either
            once, once_back = once + 2 * r * d_in, once_back + 4 * r * d_in
        if forms["A"] == "lora":
            whole, factors = 2 * d_out * d_in, 2 * r * d_out * d_in * len(low)
            return BranchCost(
                keeps_input=True,  # for the gradient of W * A + B
                kept=0,
                forward=whole,
                backward=whole,
                backward_input=whole,
                forward_once=once + factors,
                backward_once=once_back + 2 * factors,
                kept_input_once=d_out * d_in,  # W * A + B
            )
        return BranchCost(
            keeps_input=bool(low),  # for the gradient of B_down
            # W x for the gradient of A; B_down x or the sum of x for that of B
            kept=(forms["A"] != "none") * d_out + (r if low else int(forms["B"] != "none")),
            forward=len(low) * 2 * r * (d_in + d_out),
            backward=len(low) * 2 * r * (d_in + 2 * d_out),
            backward_input=len(low) * 2 * r * d_in,
            forward_once=once,
            backward_once=once_back,
        )

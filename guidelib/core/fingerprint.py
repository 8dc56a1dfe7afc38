"""The fingerprint of a base: by what a file knows again the weights that its method was trained on.

A base in 16 bits is the same base, whichever way it was rounded: from 32 bits at once, or by way of another
type.  So no hash of weights can tell, but sums of them can, with a bound on what rounding does to a sum.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from guidelib.core.anatomy import Anatomy
from guidelib.core.values import has_values

SAMPLE = 16  # entries of a tensor
BLOCK, COLUMNS = 1024, 4  # of a table with a row for each token: rows in a sum, and columns
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0}  # the largest relative error of rounding


def fingerprint(anatomy: Anatomy, without: Collection[str]) -> dict[str, str]:
    """What a file says of its base: the architecture, a hash of the shapes, and sums of weights.

    without: the parameters that are not of the base, since the file itself holds them.  weights: the sums of
    ``Sums``, 32-bit numbers in base64.  rounded: the type to which they were rounded at some time.
    """
    base = base_of(anatomy, without)
    sums = Sums(anatomy, base)
    text = base64.b64encode(sums.values.numpy().astype("<f4").tobytes()).decode()
    return {"model_type": anatomy.kind, "shapes": _shapes(base), "weights": text, "rounded": sums.rounded}


def base_of(anatomy: Anatomy, without: Collection[str]) -> dict[str, torch.Tensor]:
    parameters = sorted(anatomy.base_parameters().items())
    return {name: p for name, p in parameters if name not in without and p.numel()}


def _shapes(base: Mapping[str, torch.Tensor]) -> str:
    shapes = json.dumps({name: tuple(p.shape) for name, p in base.items()}, sort_keys=True)
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]


class Sums:
    """Sums of weights with signs, by which a base is known again, however its weights were rounded.

    Of a tensor, two sums over 8 entries each.  Of one with a row for each token, to which rows may have been
    added, sums over every row, 1,024 at a time, in its first four columns: they share a line of the cache.

    values, norms: each sum, and the length of the vector that is summed up.  names: whose it is.  The errors
    of rounding add up like those of a random walk, so that a sum moves by a share of its norm.  A sum of a
    tensor without values (meta device) is NaN.
    """

    @torch.no_grad()
    def __init__(self, anatomy: Anatomy, base: Mapping[str, torch.Tensor]):
        tokens = len(anatomy.embedding.weight)
        tables = [name for name, p in base.items() if p.dim() == 2 and len(p) == tokens]
        rest = [name for name in base if name not in tables]
        samples = torch.cat([*map(_spread, map(base.get, rest)), torch.empty(0)]).view(-1, SAMPLE).float()
        # zeros and ones say nothing about rounding, and neither do a few numbers
        full = torch.tensor([base[name].numel() >= SAMPLE for name in rest], dtype=torch.bool)
        varied = samples[full & (samples.amin(1) < samples.amax(1))]
        exact = {kind: varied == varied.to(getattr(torch, kind)).float() for kind in ("bfloat16", "float16")}
        self.rounded = next((kind for kind, same in exact.items() if same.all(1).any()), "float32")
        blocks = [samples.view(-1, SAMPLE // 2, 1)]
        self.names = [name for name in rest for _ in range(2)]
        for name in tables:
            rows = _floats(base[name][:, :COLUMNS])
            blocks.append(F.pad(rows, (0, 0, 0, -len(rows) % BLOCK)).view(-1, BLOCK, rows.shape[1]))
            self.names += [name] * (blocks[-1].shape[0] * rows.shape[1])
        self.values = torch.cat([(b * _signs(b.shape[1])).sum(1).flatten() for b in blocks])
        self.norms = torch.cat([b.norm(dim=1).flatten() for b in blocks])


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """SAMPLE entries at equal distances; zeros behind them, if there are fewer."""
    n = tensor.numel()
    if not has_values(tensor):
        return torch.full((SAMPLE,), math.nan)
    if n >= SAMPLE and tensor.is_contiguous():
        few = tensor.as_strided((SAMPLE,), (n // SAMPLE,))
        return few.cpu() if few.is_cuda else few
    few = tensor.reshape(-1)[:: max(1, n // SAMPLE)][:SAMPLE]
    return F.pad(few, (0, SAMPLE - len(few))).cpu()


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    known = has_values(tensor)
    return tensor.to("cpu", torch.float32) if known else torch.full(tensor.shape, math.nan)


def _signs(n: int) -> torch.Tensor:
    """n signs, (n, 1), as good as random: rounding moves equal rows alike, and with them it cancels."""
    return torch.arange(n, dtype=torch.float64).cos().sign().float().unsqueeze(1)


def difference(
    anatomy: Anatomy, base: Mapping[str, Any], brought: Collection[str], any_weights: bool
) -> str | None:
    """In what the base of a file differs from the model of ``anatomy``, apart from what the file brings."""
    if base["model_type"] != anatomy.kind:
        return f"its architecture {base['model_type']!r} differs from this model's {anatomy.kind!r}"
    candidates = (base_of(anatomy, without) for without in (brought, brought | anatomy.head().keys()))
    mine = next((candidate for candidate in candidates if _shapes(candidate) == base["shapes"]), None)
    if mine is None:
        return "its shapes differ from this model's"
    if any_weights:
        return None
    sums = Sums(anatomy, mine)
    theirs = torch.tensor(np.frombuffer(base64.b64decode(base["weights"]), "<f4"))
    if theirs.shape != sums.values.shape:
        return "its weights are not as many as this model's"
    unit = max(UNITS[base["rounded"]], UNITS[sums.rounded])
    # more than rounding can do to 8 entries; the last digits of a sum; and float16 has a smallest step
    close = (4 * unit + 2**-16) * sums.norms + (2**-20 if unit else 0)
    same = ((theirs - sums.values).abs() <= close).tolist()
    apart = list(dict.fromkeys(name for name, alike in zip(sums.names, same, strict=True) if not alike))
    if not apart:
        return None
    more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
    return f"its weights differ from this model's in {apart[0]!r}{more}"

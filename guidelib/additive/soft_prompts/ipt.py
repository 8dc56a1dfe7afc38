"""IPT, intrinsic prompt tuning - a prompt from a few numbers.  Qin et al. 2021, arXiv:2110.07867.

    z = W_e vec(P) + b_e,    P^ = W_2 tanh(W_1 z + b_1) + b_2        z: (d,), vec(P): (l d_model,)

First prompts are trained for many tasks, and an auto-encoder learns to give them back through d numbers, so
that P^ still does each task: the loss is that of the tasks with P^, and 200 times the mean squared error of
P^ (``fit_space``).  Then the decoder is frozen, and a new task trains z alone, from N(0, 0.02).

count = d trained; stored is the prompt that z decodes to, l d_model, once the training has ended.  The
auto-encoder, which the survey counts, is shared by all tasks.  z = 0 is a prompt like any other.

Our reading: without a space the decoder is drawn at random, to show what the learned one is worth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import nn

from guidelib.additive.soft_prompts.prompt import Vectors, first_body, frequent
from guidelib.additive.soft_prompts.reparametrized import MLP
from guidelib.core.anatomy import ADDED, Anatomy, Body
from guidelib.core.files import write
from guidelib.core.method import Attached, Method, expect, expect_seed, is_whole
from guidelib.core.points.part import Part
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.weight_delta import added_dtype


class PromptSpace(nn.Module):
    """The auto-encoder of prompts (l, d_model) by ``d`` numbers, with ``hidden`` in the decoder's middle."""

    def __init__(self, length: int, d_model: int, d: int, hidden: int, **like):
        super().__init__()
        self.shape, self.d = (length, d_model), d
        self.encoder = nn.Linear(length * d_model, d, **like)
        self.decoder = MLP(d, hidden, length * d_model, activation="tanh", **like)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (..., d) -> P (..., l, d_model)."""
        return self.decoder(z).unflatten(-1, self.shape)

    def encode(self, prompts: torch.Tensor) -> torch.Tensor:
        """P (..., l, d_model) -> z (..., d)."""
        return self.encoder(prompts.flatten(-2))

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(prompts))

    def save(self, path: str | os.PathLike) -> Path:
        """Write it to a safetensors file, whole or not at all."""
        sizes = {"length": self.shape[0], "d_model": self.shape[1], "d": self.d}
        sizes["hidden"] = self.decoder.layers[0].out_features
        return write(path, self.state_dict(), {"prompt space": json.dumps(sizes)})

    @staticmethod
    def load(path: str | os.PathLike) -> PromptSpace:
        """Read one.  Raises FileNotFoundError if there is no file, ValueError if it holds something else."""
        sizes, tensors = _read(path)
        space = PromptSpace(**sizes)
        space.load_state_dict(tensors)
        return space.requires_grad_(False)


def _read(path: str | os.PathLike) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """The sizes and the tensors of a saved space."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"space: there is no file {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            sizes = json.loads((file.metadata() or {})["prompt space"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in PromptSpace(**sizes).state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError("other tensors")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"space: {Path(path).name!r} is damaged or no space of prompts") from error
    return sizes, tensors


def fit_space(
    prompts: Sequence[torch.Tensor],
    d: int,
    *,
    hidden: int = 768,
    losses: Sequence[Callable[[torch.Tensor], torch.Tensor]] | None = None,
    steps: int = 1000,
    lr: float = 1e-3,
    seed: int = 0,
) -> PromptSpace:
    """Learn the space of ``prompts`` (l, d_model), one of each task, in ``d`` numbers.

    losses: of each task, what a prompt costs there, P -> a scalar; None for the reconstruction alone.  Each
    step takes one task in turn.  Returns the space, frozen.  Raises ValueError for prompts of several shapes,
    and impossible numbers.
    """
    shapes = {tuple(getattr(prompt, "shape", ())) for prompt in prompts}
    right = len(shapes) == 1 and len(min(shapes)) == 2
    expect(right, "prompts", sorted(shapes) or "none", "one or more of the same shape (l, d_model)")
    stacked = torch.stack([prompt.detach().float() for prompt in prompts])
    expect(bool(stacked.isfinite().all()), "prompts", "NaN or infinity", "finite numbers")
    for name, value in (("d", d), ("hidden", hidden), ("steps", steps)):
        expect(is_whole(value), name, value, "a whole number of at least 1")
    right = losses is None or len(losses) == len(prompts)
    expect(right, "losses", f"{len(losses or ())} of them", f"one for each of the {len(prompts)} prompts")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        space = PromptSpace(*stacked.shape[1:], d, hidden).to(stacked.device)
    optimizer = torch.optim.Adam(space.parameters(), lr=lr)
    for step in range(steps):
        if losses is None:
            loss = 200 * (space(stacked) - stacked).square().mean()
        else:
            i = step % len(prompts)
            again = space(stacked[i])
            loss = losses[i](again) + 200 * (again - stacked[i]).square().mean()
        optimizer.zero_grad()
        loss.backward(inputs=[*space.parameters()])  # and nothing of the model that the losses run
        optimizer.step()
    return space.requires_grad_(False)


@dataclass(frozen=True)
class IPT(Method):
    """A prompt of ``length`` vectors that is decoded from ``d`` trained numbers.

    space: the file of a PromptSpace with these sizes, which has to stay there until ``finish`` keeps the
    prompt alone; None draws a decoder with ``hidden`` numbers in its middle from ``seed``.
    """

    length: int = 20
    d: int = 5
    space: str | None = None
    hidden: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("length", "d", "hidden"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        expect_seed(self.seed)
        if self.space is not None:
            right = isinstance(self.space, str | os.PathLike)
            expect(right, "space", self.space, "the path of a file, or None")
            object.__setattr__(self, "space", os.fspath(self.space))

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = first_body(anatomy)
        table = body.embedding.weight
        like = {"device": table.device, "dtype": added_dtype(table)}
        whole = f"{ADDED}.{type(self).__name__}_{body.stack}.prompt.P"
        if whole in saved:  # in a file written after training
            return [PromptPart(self, body, Vectors(torch.zeros(self.length, body.width, **like)))]
        decoder = self.drawn(body) if self.space is None else self.learned(body)
        decoder = {name: tensor.to(**like) for name, tensor in decoder.items()}
        return [PromptPart(self, body, Intrinsic((self.length, body.width), **decoder))]

    def drawn(self, body: Body) -> dict[str, torch.Tensor]:
        """A random decoder around a prompt of frequent tokens, the same one on every device."""
        where = "meta" if body.embedding.weight.is_meta else "cpu"
        drawn = {"generator": torch.Generator().manual_seed(self.seed), "device": where}
        W_1 = torch.randn(self.hidden, self.d, dtype=torch.float32, **drawn) / self.d**0.5
        shape = (self.length * body.width, self.hidden)
        W_2 = torch.randn(*shape, dtype=torch.float32, **drawn) / self.hidden**0.5
        middle = frequent(body, self.length, drawn["generator"]).flatten()
        return {"W_1": W_1, "b_1": torch.zeros(self.hidden), "W_2": W_2, "b_2": middle}

    def learned(self, body: Body) -> dict[str, torch.Tensor]:
        """The decoder of the file."""
        sizes, tensors = _read(self.space)
        wanted = {"length": self.length, "d_model": body.width, "d": self.d}
        found = {name: sizes[name] for name in wanted}
        expect(found == wanted, "space", f"one with {found}", f"one with {wanted}")
        names = {"W": "weight", "b": "bias"}
        return {
            f"{a}_{i + 1}": tensors[f"decoder.layers.{i}.{b}"] for i in range(2) for a, b in names.items()
        }

    @torch.no_grad()
    def finish(self, attachment: Attached) -> None:
        """Keep the prompt, and let the decoder go."""
        for part in attachment.parts_of(self):
            if isinstance(part.prompt, Intrinsic):
                part.prompt = Vectors(part.prompt().clone())


class Intrinsic(nn.Module):
    """z and the frozen decoder, which no file holds."""

    def __init__(self, shape: tuple[int, int], **decoder: torch.Tensor):
        super().__init__()
        self.shape = shape
        self.z = nn.Parameter(torch.empty_like(decoder["W_1"][0]).normal_(std=0.02))
        for name, tensor in decoder.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def length(self) -> int:
        return self.shape[0]

    def forward(self, rows: int = 1) -> torch.Tensor:
        inner = torch.tanh(self.W_1 @ self.z + self.b_1)
        return (self.W_2 @ inner + self.b_2).view(self.shape)

"""The memory that training takes, by purpose."""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.core.method import expect, is_whole


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device in training, by purpose.  ``total`` adds them up; ``multiple`` divides by the
    weights of the model in its serving precision."""

    weights: int
    gradients: int
    master: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.optimizer + self.activations

    @property
    def multiple(self) -> float:
        return self.total / self.weights


def memory_plan(
    parameters: int, trainable: int, *, activations: int = 0, precision: str = "fp32"
) -> MemoryPlan:
    """Bytes to train ``trainable`` of ``parameters`` with Adam, plus ``activations`` bytes that autograd
    keeps.

    precision "fp32": weights, gradients and both moments in 4 bytes.  "mixed": weights and gradients in 2
    bytes, and for each trainable parameter a 4-byte master copy and two 4-byte moments (Micikevicius et al.
    2018, arXiv:1710.03740).  "bf16": everything in 2 bytes.  Raises ValueError for another precision or
    impossible numbers.
    """
    expect(precision in ("fp32", "mixed", "bf16"), "precision", precision, "one of fp32, mixed, bf16")
    expect(is_whole(parameters), "parameters", parameters, "a whole number of at least 1")
    for name, value in (("trainable", trainable), ("activations", activations)):
        expect(is_whole(value, 0), name, value, "a whole number of at least 0")
    size = 4 if precision == "fp32" else 2
    moment = 2 if precision == "bf16" else 4
    return MemoryPlan(
        weights=size * parameters,
        gradients=size * trainable,
        master=4 * trainable if precision == "mixed" else 0,
        optimizer=2 * moment * trainable,
        activations=activations,
    )

"""What a method costs: bytes, operations and times."""

from guidelib.costs.measure import Costs
from guidelib.costs.plan import MemoryPlan, memory_plan
from guidelib.costs.step import Step, flops, operations, saved_bytes

__all__ = [
    "Costs",
    "MemoryPlan",
    "Step",
    "flops",
    "memory_plan",
    "operations",
    "saved_bytes",
]

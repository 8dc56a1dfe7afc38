"""What a method costs: bytes, operations and times."""

from guidelib.costs.measure import Costs, MemoryPlan, flops, kernels, memory_plan, saved_bytes

__all__ = ["Costs", "MemoryPlan", "flops", "kernels", "memory_plan", "saved_bytes"]

"""What a run costs, from its recipe, the JSON of its engines and the shapes of its models alone."""

from kd.plan.memory import MemoryPlan, memory_plan
from kd.plan.shapes import check_shapes, model_shapes

__all__ = ["MemoryPlan", "check_shapes", "memory_plan", "model_shapes"]

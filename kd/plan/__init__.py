"""What a run costs: computed from its recipe, its engines' JSON and the shapes of its models."""

from kd.plan.memory import MemoryPlan, memory_plan
from kd.plan.shapes import check_shapes, model_shapes

__all__ = ["MemoryPlan", "check_shapes", "memory_plan", "model_shapes"]

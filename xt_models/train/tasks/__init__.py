"""Tasks: what a recipe's data is trained for."""

from ..config import Recipe
from .base import Batch, InOrder, Order, Task, seeded
from .classification import Classification
from .segmentation import Segmentation

__all__ = ["Batch", "InOrder", "Order", "Task", "make_task", "seeded"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
}
"""`Data.task` -> what trains it."""


def make_task(recipe: Recipe) -> Task:
    """The task of a recipe, its data read and checked."""
    return TASKS[recipe.data.task](recipe)

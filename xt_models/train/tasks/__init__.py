"""Tasks: what a recipe's data is trained for."""

from ..config import Recipe
from .base import Batch, InOrder, Order, Task, collate, seeded
from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation
from .vessels import Vessels

__all__ = ["Batch", "InOrder", "Order", "Task", "collate", "make_task", "seeded"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
    "vessels": Vessels,
}
"""`Data.task` -> what trains it."""


def make_task(recipe: Recipe) -> Task:
    """The task of a recipe, its data read and checked."""
    return TASKS[recipe.data.task](recipe)
